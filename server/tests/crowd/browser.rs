//! The page in a headless browser, where there is one: what it shows, by its DOM.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tokio::process::Command;

use super::fleet::{self, Crowd};

/// Chromium under one of its names.
fn chromium() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)))
        .find(|path| path.is_file())
}

/// The DOM of the page after some seconds of its own time.
async fn dom(chromium: &PathBuf, url: &str) -> String {
    let profile = slat_test_dir::TestDir::new();
    let run = Command::new(chromium)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
        ])
        .args(["--disable-dev-shm-usage", "--window-size=1440,900"])
        .args(["--virtual-time-budget=4000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(url)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(120), run).await;
    String::from_utf8(output.unwrap().unwrap().stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_busiest_what_is_wrong_and_why_a_migration_is_slow() {
    let Some(chromium) = chromium() else {
        println!("SKIPPED: no chromium to look at the page with");
        return;
    };
    let mut crowd = Crowd::start("127.0.0.1:0").await;
    crowd.migrations().await;
    crowd.join((0..200).filter(|host| *host != 180)).await;
    let at = crowd.address();
    super::until(at, "/api/rates?of=vms&rate=faults", |found| {
        found["lines"][0]["name"] == fleet::BUSIEST && found["more"].as_u64() >= Some(1980)
    })
    .await;
    super::until(at, "/api/migrations/move-0705", |slow| {
        slow["iteration"].as_u64() > Some(0)
    })
    .await;
    let overview = dom(&chromium, &format!("http://{at}/")).await;
    for wanted in [
        ">vm-0713<",
        ">h071<",
        "more, ",
        "the guest dirties 470 MiB/s",
        "its bandwidth cap",
        "silent; VMs there are shown as last seen",
        "that several VMs have: a call must give a uid or a host",
        "whose process lives and does not answer",
        "with a clock that is off",
        "with leftovers that no VM and no migration explains",
        "<svg",
    ] {
        assert!(overview.contains(wanted), "no {wanted}");
    }
    let ended = dom(&chromium, &format!("http://{at}/#/migrations/move-0015")).await;
    for wanted in [
        "final copy",
        "last harvest and last pages",
        "fits 300 ms",
        "of 300 ms allowed",
    ] {
        assert!(ended.contains(wanted), "no {wanted}");
    }
    let searched = dom(&chromium, &format!("http://{at}/#/vms?q=vm-0713")).await;
    assert!(searched.contains("1–1 of 1") && !searched.contains(">vm-0714<"));
    let cordoned = dom(&chromium, &format!("http://{at}/#/hosts?q=h051")).await;
    assert!(cordoned.contains("cordoned") && !cordoned.contains(">h052<"));
    let silent = dom(&chromium, &format!("http://{at}/#/vms?q=vm-1502")).await;
    assert!(silent.contains("unresponsive") && silent.contains("stopped by a signal"));
    crowd.stop().await;
}
