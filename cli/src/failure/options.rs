//! The API's fields under the names of the command line: whoever typed `--max-downtime` is not told
//! of `max_downtime`.

use slat_proto::model::PAGE_SIZE;

/// Fields, the longest of a common beginning first, and what a user types.
const FIELDS: &[(&str, &str)] = &[
    ("max_bandwidth_bytes_per_second", "--max-bandwidth"),
    ("dirty_rate_bytes_per_second", "--dirty-rate"),
    ("expected_generation", "--generation"),
    ("acknowledge_batch", "--ack"),
    ("max_total_time", "--max-total-time"),
    ("max_iterations", "--max-iterations"),
    ("max_downtime", "--max-downtime"),
    ("max_bandwidth", "--max-bandwidth"),
    ("write_percent", "--write-percent"),
    ("migration_id", "--id"),
    ("memory_bytes", "--memory"),
    ("give_up_vms", "--give-up-vms"),
    ("on_timeout", "--on-timeout"),
    ("on_overrun", "--on-overrun"),
    ("vm_uid", "--uid"),
    ("give_up", "--give-up"),
    ("vm_ids", "--as"),
    ("vm_id", "the VM's name"),
    ("save_id", "--as"),
];

/// Fields of one word: only where they stand as a field, behind these messages or before a colon.
const WORDS: &[(&str, &str)] = &[
    ("params.streams", "--streams"),
    ("params.verify", "--verify"),
    ("spec.vcpus", "--vcpus"),
    ("spec.backend", "--backend"),
    ("spec.format", "--format"),
    ("spec.memstress.pattern", "--pattern"),
    ("spec.memstress.fill", "--fill"),
    ("spec.paging", "--paging"),
    ("spec.labels", "--label"),
    ("compression.zstd_level", "--compress"),
    ("spec.numa_node", "--numa-node"),
    ("spec.raw_image.image", "--image"),
    ("spec.raw_image", "--image"),
];

/// At the beginning of a message, before a colon.
const FIRST: &[(&str, &str)] = &[("host", "--host"), ("uid", "--uid"), ("base", "--base")];

/// `text` with options in place of fields. A sentence that begins `--option: is` loses its colon,
/// and one of a range its word: whoever typed `--base` and `--size` is told of the address.
pub(crate) fn in_options(text: &str) -> String {
    let mut out = text.to_owned();
    for (field, option) in WORDS {
        out = out.replace(field, option);
    }
    for (field, option) in FIELDS {
        out = replaced(&out, field, option);
    }
    for (field, option) in FIRST {
        if let Some(rest) = out.strip_prefix(&format!("{field}: ")) {
            out = format!("{option} {rest}");
        }
    }
    if let Some(rest) = out.strip_prefix("range: ") {
        return in_addresses(rest);
    }
    match out.split_once(": ") {
        Some((option, rest)) if option.starts_with("--") && !option.contains(' ') => {
            format!("{option} {rest}")
        }
        _ => out,
    }
}

/// `text` with addresses in place of frames.
fn in_addresses(text: &str) -> String {
    const FRAME: &str = "frame 0x";
    let mut out = String::with_capacity(text.len() + 8);
    let mut rest = text;
    while let Some(at) = rest.find(FRAME) {
        let digits = &rest[at + FRAME.len()..];
        let end = digits
            .find(|c: char| !c.is_ascii_hexdigit())
            .unwrap_or(digits.len());
        let frame = u64::from_str_radix(&digits[..end], 16);
        out.push_str(&rest[..at]);
        match frame {
            Ok(frame) => {
                let address = u128::from(frame) * u128::from(PAGE_SIZE);
                out.push_str(&format!("address {address:#x}"));
            }
            Err(_) => out.push_str(&rest[at..at + FRAME.len() + end]),
        }
        rest = &digits[end..];
    }
    out.push_str(rest);
    out
}

/// Replaces whole words, and the messages they are fields of with them.
fn replaced(text: &str, field: &str, option: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(field) {
        let (before, tail) = rest.split_at(at);
        let after = &tail[field.len()..];
        let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let whole = !before.ends_with(part) && !after.starts_with(part);
        if whole {
            let path = before
                .trim_end_matches(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.');
            // Only `params.` and `spec.memstress.` belong to the field, not the word before it.
            out.push_str(if before.ends_with('.') { path } else { before });
            out.push_str(option);
        } else {
            out.push_str(before);
            out.push_str(field);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn errors_name_options() {
        for (text, shown) in [
            (
                "params.max_downtime: is 1 ms to 2000 s",
                "--max-downtime is 1 ms to 2000 s",
            ),
            (
                "spec.memory_bytes: is a multiple of 2 MiB",
                "--memory is a multiple of 2 MiB",
            ),
            (
                "spec.memstress.write_percent: is 0 to 100",
                "--write-percent is 0 to 100",
            ),
            (
                "params.streams: 17 is not between 1 and 16",
                "--streams 17 is not between 1 and 16",
            ),
            (
                "host: this is the agent of hosts/a",
                "--host this is the agent of hosts/a",
            ),
            (
                "max_total_time 3.0 s has passed; rate",
                "--max-total-time 3.0 s has passed; rate",
            ),
            (
                "raise --max-downtime or max_downtime",
                "raise --max-downtime or --max-downtime",
            ),
            (
                "spec.numa_node: 4294967295 is above 1023",
                "--numa-node 4294967295 is above 1023",
            ),
            (
                "range: frame 0x100000 is in no slot",
                "address 0x100000000 is in no slot",
            ),
            (
                "range: 0 pages from frame 0xffffffffffffffff are no range",
                "0 pages from address 0xffffffffffffffff000 are no range",
            ),
            ("range: frame 0x is", "frame 0x is"),
            ("my_max_downtime stays", "my_max_downtime stays"),
            ("no VM vms/page-size here", "no VM vms/page-size here"),
            ("name another migration_id", "name another --id"),
        ] {
            assert_eq!(in_options(text), shown);
        }
    }

    #[test]
    fn every_option_that_is_named_exists() {
        fn options(command: &clap::Command, found: &mut Vec<String>) {
            found.extend(
                command
                    .get_arguments()
                    .filter_map(|a| a.get_long().map(|long| format!("--{long}"))),
            );
            command
                .get_subcommands()
                .for_each(|sub| options(sub, found));
        }
        let mut found = Vec::new();
        options(&crate::args::Cli::command(), &mut found);
        for (_, words) in FIELDS.iter().chain(WORDS).chain(FIRST) {
            for option in words.split(' ').filter(|word| word.starts_with("--")) {
                assert!(found.iter().any(|known| known == option), "{option}");
            }
        }
    }
}
