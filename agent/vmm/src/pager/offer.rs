//! What this host's kernel can do for VMs whose memory is watched, for its agent to say.

use slat_paging::uffd::{Offer, OpenError, Uffd};
use slat_proto::v1::HostPaging;

/// Opens a userfaultfd as a VM process of this user would, and looks what it can do.
#[must_use]
pub fn host_paging() -> HostPaging {
    told(Uffd::offer())
}

fn told(offer: Result<Offer, OpenError>) -> HostPaging {
    match offer {
        Ok(offer) => HostPaging {
            can_watch: true,
            can_protect: offer.protect,
            message: if offer.protect {
                String::new()
            } else {
                "its kernel protects no shared memory from writes".to_owned()
            },
        },
        Err(error) => HostPaging {
            message: error.to_string(),
            ..HostPaging::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_words() {
        let offer = |protect| {
            Ok(Offer {
                protect,
                thread: true,
            })
        };
        let all = told(offer(true));
        assert!(all.can_watch && all.can_protect && all.message.is_empty());
        let some = told(offer(false));
        assert!(some.can_watch && !some.can_protect && !some.message.is_empty());
        let none = told(Err(OpenError::Lacks("minor faults")));
        assert!(!none.can_watch && !none.can_protect);
        assert!(none.message.contains("minor faults"), "{none:?}");
    }
}
