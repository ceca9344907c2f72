//! How long a VM stood still for its file.

use slat_proto::{model::timestamp_nanos, v1};

/// A VM that stayed paused until its file was written did not run from the moment to the end.
pub(super) fn count_pause(save: &mut v1::Save) {
    if save.vm_ran && !save.vm_paused.is_empty() {
        let nanos = |time: Option<&prost_types::Timestamp>| time.map_or(0, timestamp_nanos);
        let passed = nanos(save.end_time.as_ref()) - nanos(save.create_time.as_ref());
        save.pause_nanos = u64::try_from(passed).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_waits_for_its_file_is_paused_all_along() {
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let mut save = v1::Save {
            vm_ran: true,
            create_time: time(10),
            end_time: time(12),
            pause_nanos: 7,
            ..Default::default()
        };
        count_pause(&mut save);
        assert_eq!(save.pause_nanos, 7, "it went on");
        save.vm_paused = "its memory cannot be watched".into();
        count_pause(&mut save);
        assert_eq!(save.pause_nanos, 2_000_000_000);
    }
}
