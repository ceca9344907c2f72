//! A failure as people read it: what failed, its reason, where the VM is, details, what to do next.
//! Several VMs of one name are listed, each with the line to type.

use slat_proto::{ApiError, Reason, error::GRPC_CODE};

use super::{advice, kinds::Failure, options::in_options};
use crate::escape::{self, one_line};

/// The text; `typed` is the command line, for lines to repeat it with.
pub(super) fn text(failure: &Failure, typed: &str) -> String {
    let text = match failure {
        Failure::Usage(message) => {
            format!("error: {message}\n  next: slat help, or --help after the command")
        }
        Failure::Local { message, advice } if advice.is_empty() => format!("error: {message}"),
        Failure::Local { message, advice } | Failure::Value { message, advice } => {
            format!("error: {message}\n  next: {advice}")
        }
        Failure::Api { doing, error } => api(doing, error, typed),
        Failure::Ended { what, error, .. } if error.message.is_empty() => {
            format!("error: {what} ({})", error.reason)
        }
        Failure::Ended { what, error, .. } => format!(
            "error: {what}: {} ({})",
            one_line(&in_options(&error.message)),
            error.reason
        ),
        Failure::Said(_) | Failure::BrokenPipe => String::new(),
    };
    escape::lines(&text).into_owned()
}

/// The command line of this process, quoted where a shell would part a word.
pub(super) fn typed() -> String {
    let plain = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(&b))
    };
    let words = std::env::args().skip(1).map(|word| match word {
        word if plain(&word) => word,
        word => format!("'{}'", word.replace('\'', "'\\''")),
    });
    std::iter::once("slat".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

fn api(doing: &str, error: &ApiError, typed: &str) -> String {
    // Words of an endpoint: they draw nothing and end no line.
    let mut text = format!(
        "error: cannot {}: {}",
        one_line(doing),
        one_line(&in_options(&error.message))
    );
    let mut add = |label: &str, value: &str| {
        if !value.is_empty() {
            text.push_str(&format!("\n  {label:<7} {}", one_line(value)));
        }
    };
    add("reason:", error.reason.as_str());
    let place = error.metadata.get("vm_location").map_or("", String::as_str);
    add("vm is:", location_words(place));
    let twins = twins(error);
    let listed = ["uids", "hosts"];
    let shown = ["advice", "vm_location", GRPC_CODE];
    let details: Vec<String> = error
        .metadata
        .iter()
        .filter(|(key, value)| {
            let key = key.as_str();
            !value.is_empty()
                && !shown.contains(&key)
                && (twins.is_empty() || !listed.contains(&key))
        })
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    add("detail:", &details.join(" "));
    for (uid, host) in &twins {
        add("one is:", &format!("{uid} on {host}"));
    }
    if twins.is_empty() {
        add("next:", &advice::of(error));
    }
    for (uid, host) in &twins {
        // One that is there already cannot move there.
        if !goes_to(typed, host) {
            add("type:", &format!("{typed} --uid {uid}"));
        }
    }
    text
}

/// Whether the command that was typed names `host` as where a VM is to go.
fn goes_to(typed: &str, host: &str) -> bool {
    let words: Vec<&str> = typed.split_whitespace().collect();
    let named = |word: &str| word.strip_prefix("hosts/").unwrap_or(word) == host;
    let apart = words
        .windows(2)
        .any(|two| two[0] == "--to" && named(two[1]));
    let joined = words.iter().filter_map(|word| word.strip_prefix("--to="));
    apart || joined.into_iter().any(named)
}

/// The VMs behind a NAME_CONFLICT: uid and host of each. Empty for any other error, and when the
/// metadata do not list them.
fn twins(error: &ApiError) -> Vec<(&str, &str)> {
    if error.reason != Reason::NameConflict {
        return Vec::new();
    }
    let list = |key: &str| -> Vec<&str> {
        let text = error.metadata.get(key).map_or("", String::as_str);
        text.split([',', ' '])
            .filter(|word| !word.is_empty())
            .collect()
    };
    let (uids, hosts) = (list("uids"), list("hosts"));
    let host = |at: usize| {
        let host: &str = hosts.get(at).copied().unwrap_or("a host that is not named");
        host.strip_prefix("hosts/").unwrap_or(host)
    };
    uids.into_iter()
        .enumerate()
        .map(|(at, uid)| (uid, host(at)))
        .collect()
}

/// A place as people say it; unknown words are shown as they came.
pub(crate) fn location_words(place: &str) -> &str {
    match place {
        "SOURCE" | "source" => "on the source",
        "DESTINATION" | "destination" => "on the destination",
        "PAUSED_BOTH" | "paused_both" => {
            "paused at the destination, and frozen at the source if its process lives, until a journal is read"
        }
        "UNKNOWN" | "unknown" => "not known, or nowhere that it runs: the error says which",
        "LOST" | "lost" => "lost: its process died with its memory",
        _ => place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_conflict_shows_both_vms_and_what_to_type() {
        let error = ApiError::new(Reason::NameConflict, "2 VMs are called vms/web")
            .with("uids", "u-1,u-2")
            .with("hosts", "hosts/a,hosts/b");
        let failure = Failure::api("delete vms/web", error);
        assert_eq!(
            text(&failure, "slat delete vm web"),
            "error: cannot delete vms/web: 2 VMs are called vms/web\n  \
             reason: NAME_CONFLICT\n  \
             one is: u-1 on a\n  \
             one is: u-2 on b\n  \
             type:   slat delete vm web --uid u-1\n  \
             type:   slat delete vm web --uid u-2"
        );
        assert_eq!(failure.exit_code(), 4);
        for typed in ["slat migrate web --to b", "slat migrate web --to=hosts/b"] {
            let text = text(&failure, typed);
            assert!(text.contains("--uid u-1"), "{text}");
            assert!(!text.contains("--uid u-2"), "{text}");
        }
    }

    #[test]
    fn what_an_endpoint_says_draws_nothing_and_forges_no_line() {
        let error = ApiError::new(Reason::Internal, "\x1b[2Jgone\n  next:   rm -rf /")
            .with("vm", "vms/a\u{202e}")
            .with("advice", "a\rb");
        let failure = Failure::api("get vms/a\u{9b}", error);
        assert_eq!(
            text(&failure, "slat"),
            "error: cannot get vms/a\\u{9b}: \\u{1b}[2Jgone\\u{a}  next:   rm -rf /\n  \
             reason: INTERNAL\n  \
             detail: vm=vms/a\\u{202e}\n  \
             next:   a\\u{d}b"
        );
    }
}
