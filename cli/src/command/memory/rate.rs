//! How fast a VM dirties its memory. Ctrl-C ends the measurement, and its reader with it.

use std::time::Duration;

use slat_proto::{
    json::to_json,
    model::{DirtyRateOrder, PAGE_SIZE, proto_duration, std_duration},
    v1::{self, measure_dirty_rate_request::Mode},
};

use super::super::target::VmTarget;
use crate::{
    client::Session,
    failure::Failure,
    term::units::{Rate, Size, Span},
    view,
};

/// How it is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum ModeChoice {
    /// By the VM's own engine
    #[default]
    Auto,
    /// By hashing a random sample of pages, without dirty logging
    Sampling,
    /// By the dirty bitmap
    Bitmap,
    /// By the dirty rings
    Ring,
}

/// Options of `slat memory dirty-rate`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct RateArgs {
    #[command(flatten)]
    vm: VmTarget,
    /// For how long, as 2s: 100ms to 60s
    #[arg(long, default_value = "1s", value_name = "DURATION")]
    duration: Span,
    /// How, as sampling
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    mode: ModeChoice,
    /// Only with --mode sampling: pages hashed for each GiB, as 2048: 16 to 16384 [default: 512]
    #[arg(long, value_name = "PAGES")]
    sample_pages: Option<u32>,
}

impl RateArgs {
    fn request(&self) -> Result<v1::MeasureDirtyRateRequest, Failure> {
        if self.sample_pages.is_some() && self.mode != ModeChoice::Sampling {
            return Err(Failure::Usage(
                "--sample-pages is for --mode sampling alone: no other mode takes a sample".into(),
            ));
        }
        let mode = match self.mode {
            ModeChoice::Auto => Mode::Unspecified,
            ModeChoice::Sampling => Mode::Sampling,
            ModeChoice::Bitmap => Mode::Bitmap,
            ModeChoice::Ring => Mode::Ring,
        };
        let request = v1::MeasureDirtyRateRequest {
            vm: self.vm.name(),
            mode: mode.into(),
            duration: Some(proto_duration(self.duration.0)),
            sample_pages_per_gib: self.sample_pages.unwrap_or(0),
            uid: self.vm.uid(),
            host: self.vm.host(),
        };
        // The server checks again. Here a mistake costs no round trip and has exit code 2.
        DirtyRateOrder::from_message(&request)?;
        Ok(request)
    }
}

/// Measures.
pub(super) async fn measure(session: &Session, args: &RateArgs) -> Result<(), Failure> {
    let answer = session
        .client
        .memory()
        .measure_dirty_rate(args.request()?)
        .await
        .map_err(|status| Failure::call(format!("measure the dirty rate of {}", args.vm), status))?
        .into_inner();
    session.answer(
        || to_json(&answer),
        &args.vm.name(),
        || format!("{}: {}", args.vm, text(&answer)),
    )
}

fn text(answer: &v1::MeasureDirtyRateResponse) -> String {
    let mode = view::short(answer.mode().as_str_name(), "MODE_").to_lowercase();
    let took = std_duration(answer.duration.as_ref());
    let how = match answer.sampled_pages {
        0 => format!("{} looks", answer.looks),
        pages => format!("{pages} pages hashed {} times", answer.looks),
    };
    let set = match answer.working_set_pages {
        None => "working set unknown: nothing was written twice".to_owned(),
        Some(pages) => format!(
            "working set about {}",
            Size(pages.saturating_mul(PAGE_SIZE))
        ),
    };
    format!(
        "{} ({:.0} pages/s), {} distinct, {set}; by {mode} in {}, {how}",
        Rate(answer.bytes_per_second as u64),
        answer.pages_per_second,
        Size(answer.distinct_pages.saturating_mul(PAGE_SIZE)),
        Span(Duration::from_millis(
            u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_for_sampling_alone() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: RateArgs,
        }
        let request = |line: &str| {
            let words = ["x", "web"].into_iter().chain(line.split_whitespace());
            let line: Line = clap::Parser::parse_from(words);
            line.args.request()
        };
        let sampled = request("--mode sampling --sample-pages 100").unwrap();
        assert_eq!(sampled.sample_pages_per_gib, 100);
        for mode in ["", "--mode auto", "--mode bitmap", "--mode ring"] {
            let failure = request(&format!("{mode} --sample-pages 100")).unwrap_err();
            assert_eq!(failure.exit_code(), 2, "{mode}");
            assert!(failure.render().contains("--mode sampling"), "{failure:?}");
            request(mode).unwrap();
        }
    }

    #[test]
    fn it_says_how_it_was_measured() {
        let mut answer = v1::MeasureDirtyRateResponse {
            mode: Mode::Sampling.into(),
            duration: Some(proto_duration(Duration::from_secs(2))),
            distinct_pages: 512,
            pages_per_second: 256.0,
            bytes_per_second: 1_048_576.0,
            looks: 3,
            sampled_pages: 64,
            ..Default::default()
        };
        assert_eq!(
            text(&answer),
            "1 MiB/s (256 pages/s), 2 MiB distinct, working set unknown: nothing was written twice; \
             by sampling in 2.00 s, 64 pages hashed 3 times"
        );
        answer.working_set_pages = Some(1024);
        assert!(text(&answer).contains("working set about 4 MiB"));
    }
}
