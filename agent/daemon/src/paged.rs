//! What a VM's process last said of its paging, and who needs a pager: how the task that keeps its
//! pager ([`super::pager`]) learns that there is something to do.
//!
//! *Locking*: one watch channel, whose lock is a leaf; nothing is called under it.

use slat_proto::v1::{self, paging_status};
use tokio::sync::watch;

/// What a pager's keeper looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// The VM's memory is watched.
    pub(super) watched: bool,
    /// It is, and nobody resolves its faults.
    pub(super) no_pager: bool,
    /// Process id of its pager; 0: none.
    pub(super) pid: u32,
    /// The VM is being made of a copy, or a snapshot is about to be taken: there must be a pager
    /// whatever the VM says. So many want it.
    pub(super) asked: u32,
    /// How often somebody has begun to want it.
    pub(super) asks: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Paged(watch::Sender<Wish>);

impl Paged {
    /// Takes what the VM said; whether anything of it is news.
    pub(super) fn hear(&self, said: Option<&v1::PagingStatus>) -> bool {
        let no_pager = said.is_some_and(|said| said.state() == paging_status::State::NoPager);
        self.0.send_if_modified(|wish| {
            let heard = Wish {
                watched: said.is_some(),
                no_pager,
                pid: said.map_or(0, |said| said.pager_pid),
                asked: wish.asked,
                asks: wish.asks,
            };
            std::mem::replace(wish, heard) != heard
        })
    }

    /// Wakes at each change.
    pub(super) fn wishes(&self) -> watch::Receiver<Wish> {
        self.0.subscribe()
    }

    /// There must be a pager until the answer is dropped.
    pub(super) fn ask(&self) -> Asked<'_> {
        self.0.send_modify(|wish| {
            wish.asked += 1;
            wish.asks += 1;
        });
        Asked(self)
    }
}

/// Somebody needs a pager while this lives.
#[derive(Debug)]
pub(super) struct Asked<'a>(&'a Paged);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let paged = self.0;
        paged
            .0
            .send_modify(|wish| wish.asked = wish.asked.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_pager_is_news_once_and_wishes_end_with_their_owners() {
        let paged = Paged::default();
        let wishes = paged.wishes();
        let said = v1::PagingStatus {
            state: paging_status::State::NoPager.into(),
            ..Default::default()
        };
        assert!(!paged.hear(None));
        assert!(paged.hear(Some(&said)));
        assert!(!paged.hear(Some(&said)), "the same again");
        let (one, other) = (paged.ask(), paged.ask());
        assert!(paged.hear(None));
        assert_eq!(wishes.borrow().asked, 2, "what the VM says changes no wish");
        drop((one, other));
        let nobody = Wish {
            asks: 2,
            ..Wish::default()
        };
        assert_eq!(*wishes.borrow(), nobody);
    }
}
