//! Wall clocks of hosts that can be set: a library of a few lines, built with the C compiler and
//! preloaded into a host's agent, adds to the time what a file of that host says. VM processes
//! inherit it. The monotonic clocks stay the machine's.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};

const SOURCE: &str = include_str!("clock.c");

/// What clocks of hosts are made of.
#[derive(Clone, Debug)]
pub struct Clocks {
    library: PathBuf,
    root: PathBuf,
}

impl Clocks {
    /// Builds the library in `root`, where the hosts' files will be.
    ///
    /// # Errors
    /// Without a C compiler.
    pub fn build(root: &Path) -> anyhow::Result<Self> {
        let (source, library) = (root.join("clock.c"), root.join("clock.so"));
        fs::write(&source, SOURCE)?;
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .arg(&library)
            .arg(&source)
            .output()
            .context("cc")?;
        ensure!(built.status.success(), "cc: {built:?}");
        let root = root.to_owned();
        Ok(Self { library, root })
    }

    fn file(&self, host: &str) -> PathBuf {
        self.root.join(format!("{host}.clock"))
    }

    /// Sets a host's clock, which may run already.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn set(&self, host: &str, seconds_ahead: i64) -> anyhow::Result<()> {
        // In place and never shorter: it is mapped.
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.file(host))?;
        Ok(file.write_all(&seconds_ahead.to_ne_bytes())?)
    }

    /// How far a host's clock is ahead, seconds.
    ///
    /// # Errors
    /// When its clock was never set.
    pub fn ahead(&self, host: &str) -> anyhow::Result<i64> {
        let bytes = fs::read(self.file(host))?;
        let bytes = bytes.try_into().ok().context("eight bytes")?;
        Ok(i64::from_ne_bytes(bytes))
    }

    /// What a host's agent needs in its environment.
    #[must_use]
    pub fn environment(&self, host: &str) -> [(&'static str, OsString); 2] {
        let library = self.library.clone().into_os_string();
        let file = self.file(host).into_os_string();
        [("LD_PRELOAD", library), ("SLAT_TEST_CLOCK", file)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `date` of such a host.
    fn date(clocks: &Clocks, host: &str) -> i64 {
        let date = Command::new("date")
            .arg("+%s")
            .envs(clocks.environment(host))
            .output()
            .unwrap();
        String::from_utf8(date.stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    #[test]
    fn a_process_of_a_host_has_the_hosts_clock() {
        let root = slat_test_dir::TestDir::new();
        let clocks = Clocks::build(root.path()).unwrap();
        for ahead in [0, 7_200, -7_200] {
            clocks.set("host-a", ahead).unwrap();
            assert_eq!(clocks.ahead("host-a").unwrap(), ahead);
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            let now = i64::try_from(now.as_secs()).unwrap();
            let off = date(&clocks, "host-a") - ahead - now;
            assert!((-1..=5).contains(&off), "{ahead}: {off}");
        }
    }
}
