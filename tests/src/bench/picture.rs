//! One migration as a picture: memory left to send over time, iteration by iteration, and the parts
//! of the downtime. SVG text, from the figures of a migration that ran.

use anyhow::{Context as _, ensure};
use slat_proto::v1;

use crate::guest::{MIB, seconds};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 470.0;
/// Left and right edge of both plots.
const LEFT: f64 = 76.0;
const RIGHT: f64 = 872.0;
/// Of the upper plot.
const TOP: f64 = 62.0;
const BOTTOM: f64 = 262.0;
/// Of the bar that says where the VM runs.
const PLACE: f64 = 306.0;
/// Of the bar that the downtime consists of.
const PARTS: f64 = 386.0;
const BAR: f64 = 20.0;
/// An iteration narrower than this has its number alone.
const LABEL: f64 = 64.0;
/// And narrower than this, nothing.
const DIGIT: f64 = 12.0;

const INK: &str = "#1f2328";
const GREY: &str = "#59636e";
const GRID: &str = "#d1d9e0";
const PAGES: &str = "#0969da";
const SOURCE: &str = "#8ddb8c";
const DESTINATION: &str = "#80ccff";
const PAUSED: &str = "#cf222e";

/// What the picture shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// What was migrated, for the heading.
    pub what: String,
    /// Length in seconds and bytes left at the beginning, of each iteration while the VM ran.
    pub iterations: Vec<(f64, f64)>,
    /// Bytes left when the VM stopped.
    pub last: f64,
    /// Name and length in seconds of each part of the downtime.
    pub parts: Vec<(&'static str, f64)>,
}

impl Scene {
    /// Of a migration that completed.
    ///
    /// # Errors
    /// When it lacks a figure.
    pub fn new(what: String, migration: &v1::Migration) -> anyhow::Result<Self> {
        let progress = migration.progress.as_ref().context("no progress")?;
        let (last, live): (Vec<&v1::MigrationIteration>, Vec<_>) =
            progress.iterations.iter().partition(|one| one.r#final);
        let parts = progress.downtime_breakdown.as_ref();
        let parts = parts.context("no parts of the downtime")?;
        let last = last.first().context("no final iteration")?;
        ensure!(!live.is_empty(), "no iteration while the VM ran");
        Ok(Self {
            what,
            iterations: live
                .iter()
                .map(|one| {
                    let left = one.remaining_bytes_start as f64;
                    (seconds(one.duration.as_ref()), left)
                })
                .collect(),
            last: last.remaining_bytes_start as f64,
            parts: vec![
                ("pause", seconds(parts.pause.as_ref())),
                ("final copy", seconds(parts.final_copy.as_ref())),
                ("state", seconds(parts.state.as_ref())),
                ("commit", seconds(parts.commit.as_ref())),
                ("resume", seconds(parts.resume.as_ref())),
            ],
        })
    }

    /// Seconds from the first page until the VM stopped.
    fn live(&self) -> f64 {
        self.iterations.iter().map(|(seconds, _)| seconds).sum()
    }

    /// Seconds without the VM.
    fn downtime(&self) -> f64 {
        self.parts.iter().map(|(_, seconds)| seconds).sum()
    }

    /// The picture.
    #[must_use]
    pub fn svg(&self) -> String {
        let mut svg = Svg::new(&self.what);
        self.remaining(&mut svg);
        self.place(&mut svg);
        self.blackout(&mut svg);
        svg.end()
    }

    fn most(&self) -> f64 {
        let bytes = self.iterations.iter().map(|(_, left)| *left);
        bytes.fold(self.last, f64::max)
    }

    /// Seconds since the first page, across.
    fn across(&self, seconds: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * seconds / (self.live() + self.downtime())
    }

    /// Memory left to send, over time.
    fn remaining(&self, svg: &mut Svg) {
        let step = nice(self.most() / MIB as f64 / 4.0);
        let top = (self.most() / MIB as f64 / step).ceil() * step;
        let up = |bytes: f64| BOTTOM - (BOTTOM - TOP) * bytes / MIB as f64 / top;
        for tick in ticks(step, top) {
            let y = up(tick * MIB as f64);
            svg.line(LEFT, y, RIGHT, y, GRID);
            svg.text(LEFT - 8.0, y + 4.0, "end", GREY, &number(tick, step));
        }
        svg.turned(22.0, (TOP + BOTTOM) / 2.0, "memory left to send, MiB");
        let mut at = 0.0;
        let mut points = vec![(LEFT, BOTTOM)];
        for (number, (length, left)) in self.iterations.iter().enumerate() {
            let (from, to) = (self.across(at), self.across(at + length));
            points.extend([(from, up(*left)), (to, BOTTOM)]);
            let y = (up(*left) - 8.0).max(TOP - 8.0);
            if to - from > LABEL {
                let name = format!("iteration {number}");
                svg.text(from + 4.0, y, "start", PAGES, &name);
            } else if to - from > DIGIT {
                svg.text(from + 4.0, y, "start", PAGES, &number.to_string());
            }
            at += length;
        }
        points.extend([
            (self.across(at), up(self.last)),
            (self.across(at + self.downtime()), BOTTOM),
        ]);
        svg.area(&points, PAGES);
        svg.line(LEFT, BOTTOM, RIGHT, BOTTOM, GREY);
        let whole = self.live() + self.downtime();
        let step = nice(whole / 8.0);
        for tick in ticks(step, whole) {
            let x = self.across(tick);
            svg.line(x, BOTTOM, x, BOTTOM + 5.0, GREY);
            svg.text(x, BOTTOM + 19.0, "middle", GREY, &number(tick, step));
        }
        let middle = (LEFT + RIGHT) / 2.0;
        let words = "time since the first page, s";
        svg.text(middle, BOTTOM + 36.0, "middle", INK, words);
    }

    /// Where the VM runs meanwhile.
    fn place(&self, svg: &mut Svg) {
        let stop = self.across(self.live());
        svg.bar(LEFT, PLACE, stop - LEFT, SOURCE);
        // As wide as it is, but never invisible.
        let width = (RIGHT - stop).max(2.0);
        svg.bar(stop, PLACE, width, PAUSED);
        svg.bar(
            stop + width,
            PLACE,
            WIDTH - 12.0 - stop - width,
            DESTINATION,
        );
        let words = "the VM runs on the source, writing its memory";
        svg.text(LEFT + 8.0, PLACE + 14.0, "start", INK, words);
        let words = format!(
            "then it is paused for {:.1} ms and runs on at the destination",
            self.downtime() * 1e3
        );
        svg.text(LEFT + 8.0, PLACE + BAR + 18.0, "start", PAUSED, &words);
        svg.line(stop, PLACE + BAR, LEFT, PARTS - 6.0, GRID);
        svg.line(stop + width, PLACE + BAR, RIGHT, PARTS - 6.0, GRID);
    }

    /// The downtime, part by part.
    fn blackout(&self, svg: &mut Svg) {
        let whole = self.downtime();
        let across = |seconds: f64| LEFT + (RIGHT - LEFT) * seconds / whole;
        let shades = ["#ffcecb", "#ff8182", "#cf222e", "#82071e", "#d4a72c"];
        let mut at = 0.0;
        let mut legend = LEFT;
        for ((name, length), shade) in self.parts.iter().zip(shades) {
            svg.bar(across(at), PARTS, across(at + length) - across(at), shade);
            at += length;
            svg.square(legend, PARTS + 60.0, shade);
            let words = format!("{name} {:.2} ms", length * 1e3);
            svg.text(legend + 17.0, PARTS + 70.0, "start", INK, &words);
            legend += (RIGHT - LEFT) / self.parts.len() as f64;
        }
        let step = nice(whole * 1e3 / 8.0);
        for tick in ticks(step, whole * 1e3) {
            let x = across(tick / 1e3);
            svg.line(x, PARTS + BAR, x, PARTS + BAR + 5.0, GREY);
            svg.text(x, PARTS + BAR + 18.0, "middle", GREY, &number(tick, step));
        }
        let words = "time since the VM was asked to stop, ms";
        svg.text(RIGHT, PARTS + BAR + 34.0, "end", INK, words);
    }
}

/// Multiples of `step` from 0 to `end`.
fn ticks(step: f64, end: f64) -> impl Iterator<Item = f64> {
    (0..)
        .map(move |number| f64::from(number) * step)
        .take_while(move |tick| *tick <= end * 1.000_001)
}

/// 1, 2 or 5 times a power of ten, not below `step`.
fn nice(step: f64) -> f64 {
    let mut steps =
        (-6..9).flat_map(|power| [1.0, 2.0, 5.0].map(|times| times * 10f64.powi(power)));
    steps.find(|one| *one >= step * 0.999).unwrap_or(step)
}

/// With as many digits as the step between ticks needs.
fn number(value: f64, step: f64) -> String {
    let digits = if step >= 1.0 {
        0
    } else {
        1 + usize::from(step < 0.1)
    };
    format!("{value:.digits$}")
}

struct Svg(String);

impl Svg {
    fn new(heading: &str) -> Self {
        let mut svg = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"system-ui, 'DejaVu Sans', sans-serif\" font-size=\"13\" role=\"img\">\n\
             <title>{heading}</title>\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\" fill=\"#ffffff\"/>\n"
        ));
        svg.put(format_args!(
            "<text x=\"{LEFT}\" y=\"30\" fill=\"{INK}\" font-size=\"16\" font-weight=\"600\">{heading}</text>"
        ));
        svg
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        self.0.push_str(&format!("{element}\n"));
    }

    fn line(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) {
        self.put(format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
        ));
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, colour: &str, words: &str) {
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>"
        ));
    }

    fn turned(&mut self, x: f64, y: f64, words: &str) {
        self.put(format_args!(
            "<text transform=\"translate({x:.1} {y:.1}) rotate(-90)\" text-anchor=\"middle\" \
             fill=\"{INK}\">{words}</text>"
        ));
    }

    fn bar(&mut self, x: f64, y: f64, width: f64, colour: &str) {
        self.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
        ));
    }

    fn square(&mut self, x: f64, y: f64, colour: &str) {
        self.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>"
        ));
    }

    fn area(&mut self, points: &[(f64, f64)], colour: &str) {
        let points: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        self.put(format_args!(
            "<polygon points=\"{}\" fill=\"{colour}\" fill-opacity=\"0.18\" stroke=\"{colour}\" \
             stroke-width=\"1.5\"/>",
            points.join(" ")
        ));
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> Scene {
        let mib = |count: u64| (count * MIB) as f64;
        Scene {
            what: "A VM".into(),
            iterations: vec![(2.0, mib(512)), (0.5, mib(128)), (0.1, mib(32))],
            last: mib(2),
            parts: vec![("pause", 0.001), ("final copy", 0.01), ("resume", 0.002)],
        }
    }

    #[test]
    fn the_picture_has_the_figures_and_stays_on_its_sheet() {
        let svg = scene().svg();
        for words in [
            "memory left to send, MiB",
            "time since the first page, s",
            "iteration 0",
            "iteration 1",
            "paused for 13.0 ms",
            "final copy 10.00 ms",
        ] {
            assert!(svg.contains(words), "{words} is not in\n{svg}");
        }
        assert!(!svg.contains("iteration 2"), "too narrow for its label");
        assert!(svg.len() < 60_000);
        for attribute in svg.split(" x=\"").skip(1) {
            let x: f64 = attribute.split('"').next().unwrap().parse().unwrap();
            assert!((0.0..=WIDTH).contains(&x), "{x}");
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(nice(0.3), 0.5);
        assert_eq!(nice(128.0), 200.0);
        assert_eq!(ticks(0.5, 1.6).collect::<Vec<_>>(), [0.0, 0.5, 1.0, 1.5]);
        assert_eq!(number(0.5, 0.5), "0.5");
        assert_eq!(number(200.0, 100.0), "200");
    }

    #[test]
    fn what_did_not_end_has_no_picture() {
        let running = v1::Migration {
            progress: Some(v1::MigrationProgress::default()),
            ..Default::default()
        };
        assert!(Scene::new(String::new(), &running).is_err());
    }
}
