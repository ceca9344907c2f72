//! A save: its columns, its page, and how far it is while it is written.

use std::time::{Duration, SystemTime};

use slat_proto::{model::PAGE_SIZE, v1};

use super::words::{age, clock, count, fields, id, per_second, short, since, size_cell};
use crate::{
    escape,
    output::{Column, Resource, cells, heads},
    term::{
        out,
        table::{Cell, Table, Tone},
        units::{Rate, Size, Span},
    },
};

/// `WRITTEN`, `WRITING`, `FAILED`.
pub(crate) fn save_state(state: v1::save::State) -> &'static str {
    short(state.as_str_name(), "STATE_")
}

fn tone(state: v1::save::State) -> Tone {
    use v1::save::State;
    match state {
        State::Written => Tone::Good,
        State::Writing => Tone::Warn,
        State::Failed => Tone::Bad,
        State::Unspecified => Tone::Plain,
    }
}

/// `host-a` of `hosts/host-a/saves/web-1`.
fn host(save: &v1::Save) -> &str {
    let rest = save.name.strip_prefix("hosts/").unwrap_or(&save.name);
    rest.split_once('/').map_or(rest, |(host, _)| host)
}

/// Why it failed, or why its VM stands still.
fn note(save: &v1::Save) -> Cell {
    let paused = Some(&save.vm_paused).filter(|_| save.state() == v1::save::State::Writing);
    let notes = [Some(&save.state_message), paused];
    let notes = notes.into_iter().flatten();
    let notes = notes.filter(|note| !note.is_empty()).cloned();
    super::words::notes(notes.collect())
}

fn pause(save: &v1::Save) -> Cell {
    if save.pause_nanos == 0 {
        return Cell::none();
    }
    let pause = Duration::from_nanos(save.pause_nanos);
    Cell::number(save.pause_nanos, Span(pause).to_string())
}

fn packed(save: &v1::Save) -> String {
    match save.compression.unwrap_or_default().zstd_level {
        0 => "none".to_owned(),
        level => format!("zstd {level}"),
    }
}

impl Resource for v1::Save {
    const COLLECTION: &'static str = "saves";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("NAME", |save| id(&save.name).into()),
        Column::new("HOST", |save| host(save).into()),
        Column::new("STATE", |save| {
            Cell::toned(save_state(save.state()), tone(save.state()))
        }),
        Column::new("VM", |save| id(&save.vm).into()),
        Column::new("MEMORY", |save| size_cell(save.memory_bytes)),
        Column::new("FILE", |save| size_cell(save.file_bytes)),
        Column::new("PAUSE", pause),
        Column::new("BASE", |save| id(&save.base).into()),
        Column::wide("PACKED", |save| packed(save).into()),
        Column::wide("PAGES", |save| count(save.pages)),
        Column::wide("VM-UID", |save| save.vm_uid.as_str().into()),
        Column::wide("EPOCH", |save| count(save.vm_epoch)),
        Column::wide("PATH", |save| save.path.as_str().into()),
        Column::drifting("AGE", |save| age(save.create_time.as_ref())),
        Column::new("NOTE", note),
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn key(&self) -> String {
        self.name.clone()
    }

    fn page(&self, colours: bool) -> String {
        let table = Table::new(&heads::<Self>(false), colours).render(&[cells(self, false)]);
        let more = fields(&[
            ("why", self.state_message.clone()),
            ("reason", self.reason.clone()),
            ("vm paused", self.vm_paused.clone()),
            ("moment", clock(self.create_time.as_ref())),
            (
                "vm",
                if self.vm_ran { "ran" } else { "was paused" }.to_owned(),
            ),
            ("vm uid", self.vm_uid.clone()),
            ("vm epoch", self.vm_epoch.to_string()),
            ("pages", pages(self)),
            ("packed", packed(self)),
            ("took", took(self)),
            ("file", self.path.clone()),
        ]);
        format!("{table}\n{more}").trim_end().to_owned()
    }
}

/// What of its memory is in the file.
fn pages(save: &v1::Save) -> String {
    let here = Size(save.pages.saturating_mul(PAGE_SIZE));
    let all = Size(save.memory_bytes);
    if !save.base.is_empty() {
        return format!("{here} of {all}; the rest is in {} or empty", save.base);
    }
    let empty = Size(save.empty_pages.saturating_mul(PAGE_SIZE));
    format!("{here} of {all}; {empty} are empty")
}

/// From its moment to the end of its file; `None` while it is written.
fn duration(save: &v1::Save) -> Option<Duration> {
    let began = SystemTime::try_from(*save.create_time.as_ref()?).ok()?;
    let ended = SystemTime::try_from(*save.end_time.as_ref()?).ok()?;
    ended.duration_since(began).ok()
}

fn took(save: &v1::Save) -> String {
    let Some(took) = duration(save) else {
        return String::new();
    };
    let rate = per_second(save.file_bytes, took);
    let rate = rate.map_or_else(String::new, |rate| format!(", {} of file", Rate(rate)));
    format!("{}{rate}", Span(took))
}

/// A save that was written, in one sentence.
pub(crate) fn saved(save: &v1::Save) -> String {
    let mut words = vec![format!("{} of memory", Size(save.memory_bytes))];
    words.push(format!("{} of file", Size(save.file_bytes)));
    if save.pause_nanos > 0 {
        let pause = Span(Duration::from_nanos(save.pause_nanos));
        words.push(format!("{} paused for {pause}", save.vm));
    } else {
        words.push(format!("{} did not run", save.vm));
    }
    let took = took(save);
    if !took.is_empty() {
        words.push(format!("written in {took}"));
    }
    format!(
        "{} {}: {}",
        save.name,
        save_state(save.state()),
        words.join(", ")
    )
}

/// Shows a save as its states come in: on a terminal one line drawn over and over, elsewhere a line
/// for each tenth.
#[derive(Debug)]
pub(crate) struct SaveProgress {
    live: bool,
    drawn: bool,
    told: Option<u64>,
}

impl SaveProgress {
    /// On standard error.
    pub(crate) fn new() -> Self {
        Self {
            live: out::stderr_is_live(),
            drawn: false,
            told: None,
        }
    }

    /// Shows how it is now.
    pub(crate) fn update(&mut self, save: &v1::Save) {
        let line = escape::one_line(&far(save)).into_owned();
        if self.live {
            let width = out::stderr_width().saturating_sub(1);
            let line: String = line.chars().take(width).collect();
            out::say_raw(&format!("\r\x1b[2K{line}"));
            self.drawn = true;
            return;
        }
        let tenth = percent(save) / 10;
        if self.told.is_none_or(|told| told < tenth) {
            self.told = Some(tenth);
            out::say(line);
        }
    }

    /// Takes the live line away.
    pub(crate) fn finish(&mut self) {
        if self.drawn {
            out::say_raw("\r\x1b[2K");
            self.drawn = false;
        }
    }
}

impl Drop for SaveProgress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn percent(save: &v1::Save) -> u64 {
    let share = u128::from(save.done_bytes) * 100 / u128::from(save.memory_bytes.max(1));
    u64::try_from(share).unwrap_or(100).min(100)
}

fn far(save: &v1::Save) -> String {
    let mut line = format!(
        "{}  {}  {} %  {} of {}, {} of file",
        id(&save.name),
        save_state(save.state()),
        percent(save),
        Size(save.done_bytes),
        Size(save.memory_bytes),
        Size(save.file_bytes),
    );
    let running = since(save.create_time.as_ref()).and_then(|ran| per_second(save.done_bytes, ran));
    if let Some(rate) = running.filter(|_| save.state() == v1::save::State::Writing) {
        line.push_str(&format!(", {}", Rate(rate)));
    }
    if !save.vm_paused.is_empty() {
        line.push_str(&format!("  {} is paused: {}", save.vm, save.vm_paused));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save() -> v1::Save {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        v1::Save {
            name: "hosts/host-a/saves/web-1".into(),
            state: v1::save::State::Written.into(),
            vm: "vms/web".into(),
            vm_ran: true,
            create_time: at(100),
            end_time: at(102),
            pause_nanos: 12_000_000,
            memory_bytes: 1 << 30,
            done_bytes: 256 << 20,
            file_bytes: 128 << 20,
            pages: 32_768,
            empty_pages: 229_376,
            ..Default::default()
        }
    }

    #[test]
    fn a_save_says_its_pause_its_bytes_and_its_rate() {
        let words = saved(&save());
        assert_eq!(
            words,
            "hosts/host-a/saves/web-1 WRITTEN: 1 GiB of memory, 128 MiB of file, vms/web paused for 12.0 ms, \
             written in 2.00 s, 64 MiB/s of file"
        );
        let mut still = save();
        still.pause_nanos = 0;
        assert!(saved(&still).contains("vms/web did not run"));
    }

    #[test]
    fn its_page_tells_what_is_not_in_the_file() {
        let mut one = save();
        let page = one.page(false);
        assert!(
            page.contains("128 MiB of 1 GiB; 896 MiB are empty"),
            "{page}"
        );
        assert!(page.contains("host-a"), "{page}");
        one.base = "hosts/host-a/saves/web-0".into();
        let page = one.page(false);
        assert!(
            page.contains("the rest is in hosts/host-a/saves/web-0 or empty"),
            "{page}"
        );
    }

    #[test]
    fn a_vm_that_stands_still_is_told() {
        let mut one = save();
        one.set_state(v1::save::State::Writing);
        one.vm_paused = "its memory cannot be watched".into();
        let line = far(&one);
        assert!(
            line.starts_with("web-1  WRITING  25 %  256 MiB of 1 GiB, 128 MiB of file"),
            "{line}"
        );
        assert!(
            line.ends_with("vms/web is paused: its memory cannot be watched"),
            "{line}"
        );
    }
}
