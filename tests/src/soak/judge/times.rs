//! Times: clocks of hosts are measured, a VM is as old as it is, phases follow one another.

use super::rule::{Broken, Rule};
use crate::soak::{
    observe::Views,
    oracle::{Ledger, Truth},
};

const SECOND: i128 = 1_000_000_000;
/// An offset that is measured says what it is.
const MEASURED: i128 = SECOND;
/// The server corrects no offset below five seconds that it has not measured, and a create may take
/// a second longer than its answer says.
const OLD: i128 = 6 * SECOND;

pub(super) fn times(truth: &Truth, views: &Views, ledger: &Ledger, broken: &mut Vec<Broken>) {
    for (host, ahead) in &truth.clocks {
        if !truth.is_up(host) {
            continue;
        }
        let is = |offset: i128| (offset - i128::from(*ahead) * SECOND).abs() < MEASURED;
        let shown = views.offsets.get(host).copied();
        if !shown.is_some_and(is) {
            let said = format!("{ahead} s ahead; shown as {shown:?} ns");
            broken.push(Broken::new(Rule::TimesAreTrue, host, said));
        }
        let short = host.strip_prefix("hosts/").unwrap_or(host);
        let series = format!("slat_host_clock_offset_seconds{{host=\"{short}\"}}");
        let value = views.metrics.get(&series).copied();
        #[expect(clippy::cast_precision_loss, reason = "hours in seconds")]
        let right = value.is_some_and(|value| (value - *ahead as f64).abs() < 1.0);
        if !right {
            let said = format!("{ahead} s ahead; /metrics {value:?}");
            broken.push(Broken::new(Rule::TimesAreTrue, series, said));
        }
    }
    for (uid, (before, after)) in &ledger.born {
        let lives = truth
            .owner(uid)
            .is_some_and(|owner| owner.lives && truth.is_up(&owner.host));
        let Some(shown) = views.born.get(uid).filter(|_| lives) else {
            continue;
        };
        if *shown < before - OLD || *shown > after + OLD {
            let off = (shown - before) / 1_000_000;
            let said = format!("its create time is {off} ms after it was asked for");
            broken.push(Broken::new(Rule::TimesAreTrue, uid, said));
        }
    }
    for moved in &views.migrations {
        if !moved.times.is_sorted() {
            let said = format!("its times run backwards: {:?}", moved.times);
            broken.push(Broken::new(Rule::TimesAreTrue, &moved.name, said));
        }
    }
}
