//! A row's result, and its goals judged.

use serde::Serialize;

/// Nanoseconds an operation, over all samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Stat {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// What a subject is in its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// What the row is about.
    Slat,
    /// Another crate.
    Peer,
    /// The baseline that the row names.
    Baseline,
    /// Slat with one thread, where the row is about two.
    OneThread,
    /// For the reader only.
    Other,
}

/// What a goal compares Slat with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    /// Faster than every peer.
    FasterThanPeers,
    /// At most this many times the fastest peer.
    Peer(f64),
    /// At most this many times the baseline.
    Baseline(f64),
    /// At least this many times the throughput of one thread.
    OneThread(f64),
    /// At most this many nanoseconds.
    Nanoseconds(f64),
}

/// One subject's result.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) stat: Stat,
}

/// A result that was counted and not timed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    pub(crate) met: bool,
}

/// A row's result.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What the nanoseconds are for.
    pub(crate) per: &'static str,
    pub(crate) figures: Vec<Figure>,
    pub(crate) counted: Option<Counted>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) goal: Option<String>,
    /// Why nothing was measured.
    pub(crate) skipped: Option<String>,
}

impl Row {
    fn first(&self, role: Role) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.role == role)
    }

    pub(crate) fn slat(&self) -> Option<&Figure> {
        self.first(Role::Slat)
    }

    /// The fastest peer.
    pub(crate) fn peer(&self) -> Option<&Figure> {
        self.figures
            .iter()
            .filter(|figure| figure.role == Role::Peer)
            .min_by(|a, b| a.stat.median.total_cmp(&b.stat.median))
    }

    pub(crate) fn baseline(&self) -> Option<&Figure> {
        self.first(Role::Baseline)
    }

    pub(crate) fn one_thread(&self) -> Option<&Figure> {
        self.first(Role::OneThread)
    }

    /// Slat's median over another's.
    pub(crate) fn over(&self, other: Option<&Figure>) -> Option<f64> {
        Some(self.slat()?.stat.median / other?.stat.median)
    }

    fn holds(&self, limit: Limit) -> Option<bool> {
        Some(match limit {
            Limit::FasterThanPeers => self.over(self.peer())? < 1.0,
            Limit::Peer(times) => self.over(self.peer())? <= times,
            Limit::Baseline(times) => self.over(self.baseline())? <= times,
            Limit::OneThread(times) => 1.0 / self.over(self.one_thread())? >= times,
            Limit::Nanoseconds(most) => self.slat()?.stat.median <= most,
        })
    }

    /// Whether every part of the goal was met; `None` without a goal or without a result.
    pub(crate) fn met(&self) -> Option<bool> {
        if let Some(counted) = self.counted {
            return Some(counted.met);
        }
        let mut limits = self.limits.iter().map(|&limit| self.holds(limit));
        let first = limits.next()??;
        limits.try_fold(first, |met, holds| Some(met && holds?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(limits: &[Limit]) -> Row {
        let figure = |role, name: &str, median| Figure {
            role,
            name: name.into(),
            stat: Stat {
                median,
                min: median,
                max: median,
            },
        };
        Row {
            name: "a".into(),
            per: "page",
            figures: vec![
                figure(Role::Slat, "slat", 2.0),
                figure(Role::Peer, "slow", 9.0),
                figure(Role::Peer, "fast", 3.0),
                figure(Role::Baseline, "baseline", 0.5),
                figure(Role::OneThread, "one", 3.5),
            ],
            counted: None,
            limits: limits.to_vec(),
            goal: None,
            skipped: None,
        }
    }

    #[test]
    fn a_goal_is_met_when_each_part_is() {
        assert_eq!(row(&[]).met(), None);
        assert_eq!(row(&[Limit::FasterThanPeers]).met(), Some(true));
        assert_eq!(row(&[Limit::Baseline(3.0)]).met(), Some(false));
        assert_eq!(
            row(&[Limit::FasterThanPeers, Limit::Baseline(3.0)]).met(),
            Some(false)
        );
        assert_eq!(row(&[Limit::Peer(0.6)]).met(), Some(false));
        assert_eq!(row(&[Limit::OneThread(1.7)]).met(), Some(true));
        assert_eq!(row(&[Limit::OneThread(1.8)]).met(), Some(false));
        assert_eq!(row(&[Limit::Nanoseconds(2.0)]).met(), Some(true));
        assert_eq!(row(&[]).peer().map(|peer| peer.name.as_str()), Some("fast"));
    }

    #[test]
    fn without_a_result_nothing_is_met() {
        let mut row = row(&[Limit::FasterThanPeers]);
        row.figures.clear();
        assert_eq!(row.met(), None);
    }
}
