//! What a view does.

use slat_proto::model::MemoryBacking;

use super::*;

fn views(pages: u64) -> (GuestView, HostView) {
    let backing = Arc::new(Backing::new("test", pages, MemoryBacking::Auto).unwrap());
    (
        GuestView::new(&backing).unwrap(),
        HostView::new(&backing).unwrap(),
    )
}

#[test]
fn bytes_words_and_zero_pages() {
    let (_, host) = views(4);
    assert!(host.is_zero(3));
    host.write(3 * PAGE + PAGE - 1, &[7]);
    assert!(!host.is_zero(3) && host.is_zero(2));
    host.write(8, &[8, 7, 6, 5, 4, 3, 2, 1]);
    let mut bytes = [0; 8];
    host.read(8, &mut bytes);
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
}

#[test]
fn what_one_view_writes_the_other_reads_wherever_it_is_mapped() {
    let (guest, host) = views(4);
    guest.store(8, 0x0102_0304_0506_0708);
    let mut bytes = [0; 8];
    host.read(8, &mut bytes);
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
    host.write(PAGE, &[1]);
    assert_eq!(guest.load(PAGE), 1);
    assert_ne!(guest.address(), host.range_ptr(0, 1).addr() as u64);
}

#[test]
fn what_the_guest_loses_the_host_keeps() {
    let (guest, host) = views(16);
    guest.populate(0, 16).unwrap();
    host.map(0, 16).unwrap();
    host.write(5 * PAGE, b"kept");
    guest.drop_mappings(0, 16).unwrap();
    assert_eq!(resident(guest.address()), 0);
    assert_eq!(resident(host.range_ptr(0, 1).addr() as u64), 16 * PAGE_SIZE);
    assert_eq!(guest.load(5 * PAGE), u64::from_le_bytes(*b"kept\0\0\0\0"));
}

#[test]
#[should_panic(expected = "reaches beyond the end")]
fn access_beyond_the_end_is_caught() {
    views(1).1.write(PAGE - 1, &[0, 0]);
}

#[test]
fn a_view_outlives_the_one_that_was_made_with_it() {
    let (guest, host) = views(1);
    guest.store(0, 7);
    drop(guest);
    assert!(!host.is_zero(0));
}
