//! Pagination (AIP-158) over lists sorted by name: the token is the last name of the page before.

use crate::ApiError;

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

/// A validated `page_size` and `page_token`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    size: usize,
    after: Option<String>,
}

impl PageRequest {
    /// From the request's fields.
    ///
    /// # Errors
    /// BAD_PARAMETER when `page_size` is negative.
    pub fn new(page_size: i32, page_token: &str) -> Result<Self, ApiError> {
        let size = usize::try_from(page_size)
            .map_err(|_| ApiError::bad_parameter("page_size", "must not be negative"))?;
        Ok(Self {
            size: if size == 0 {
                DEFAULT_PAGE
            } else {
                size.min(MAX_PAGE)
            },
            after: (!page_token.is_empty()).then(|| page_token.to_owned()),
        })
    }
}

/// One page of `items`, which are in the order of the list, and the token of the next (empty at the
/// end).
///
/// `key` names an item. A token whose item is gone starts at the list's beginning when the list is
/// not sorted by key; lists sorted ascending by key go on at the next greater one.
pub fn paginate<T>(
    items: Vec<T>,
    page: &PageRequest,
    key: impl Fn(&T) -> String,
) -> (Vec<T>, String) {
    let start = match &page.after {
        None => 0,
        Some(after) => match items.iter().position(|item| key(item) == *after) {
            Some(at) => at + 1,
            None => items
                .iter()
                .position(|item| key(item) > *after)
                .unwrap_or(items.len()),
        },
    };
    let rest = items.len().saturating_sub(start);
    let taken: Vec<T> = items.into_iter().skip(start).take(page.size).collect();
    let token = match taken.last() {
        Some(last) if rest > taken.len() => key(last),
        _ => String::new(),
    };
    (taken, token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_the_list_once() {
        let items: Vec<String> = (0..7).map(|i| format!("n{i}")).collect();
        let mut seen = Vec::new();
        let mut token = String::new();
        loop {
            let page = PageRequest::new(3, &token).unwrap();
            let (part, next) = paginate(items.clone(), &page, Clone::clone);
            assert!(part.len() <= 3);
            seen.extend(part);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, items);
        assert!(PageRequest::new(-1, "").is_err());
    }
}
