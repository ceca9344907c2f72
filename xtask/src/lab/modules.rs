//! Kernel modules out of a package of a kernel, in the order in which they are loaded.
//!
//! A package has no list of what needs what: that is made when it is installed. But each module
//! says it itself, in its section `.modinfo`. What the kernel has built in is not loaded.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, ensure};
use slat_packages::Root;

/// One module: its name and what is loaded.
pub(crate) type Module = (String, Vec<u8>);

/// Where a kernel's modules are: the folder with the kernel's version for a name.
fn folder(root: &Root) -> anyhow::Result<PathBuf> {
    let all = root.path("usr/lib/modules");
    let entry = fs::read_dir(&all)
        .with_context(|| format!("reading {}", all.display()))?
        .next()
        .context("the kernel's package has no modules")??;
    Ok(entry.path())
}

/// Names as the kernel has them, with their files.
fn files(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.join("kernel")];
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if let Some(name) = name_of(&path) {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}

fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (name, _) = name.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// Names that a module needs, from its own words.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let rest = &module[at + KEY.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    let list = String::from_utf8_lossy(&rest[..end]);
    let names = list.split(',').filter(|name| !name.is_empty());
    names.map(|name| name.replace('-', "_")).collect()
}

fn content(root: &Root, path: &Path) -> anyhow::Result<Vec<u8>> {
    let ending = path.extension().unwrap_or_default();
    if ending == "ko" {
        return Ok(fs::read(path)?);
    }
    ensure!(ending == "xz", "{}: neither plain nor xz", path.display());
    let mut unpack = root.command("usr/bin/xz");
    unpack.arg("-dc").arg(path).stdin(Stdio::null());
    let output = unpack.output().context("starting xz")?;
    ensure!(
        output.status.success(),
        "xz -dc {}: {}",
        path.display(),
        output.status
    );
    Ok(output.stdout)
}

/// `wanted` and all they need, what is needed first.
///
/// # Errors
/// When the kernel has no such module.
pub(crate) fn in_order(root: &Root, wanted: &[&str]) -> anyhow::Result<Vec<Module>> {
    let folder = folder(root)?;
    let files = files(&folder)?;
    let list = fs::read_to_string(folder.join("modules.builtin")).context("modules.builtin")?;
    let built_in: Vec<String> = list
        .lines()
        .filter_map(|line| name_of(Path::new(line)))
        .collect();
    let mut ordered: Vec<Module> = Vec::new();
    for name in wanted {
        add(name, &mut ordered, &|name| {
            if built_in.iter().any(|one| one == name) {
                return Ok(None);
            }
            let path = files.get(name);
            let path = path.with_context(|| format!("the kernel has no module {name}"))?;
            content(root, path).map(Some)
        })?;
    }
    Ok(ordered)
}

/// Adds `name` behind what it needs. `read` gives its content, nothing when it is built in.
fn add(
    name: &str,
    ordered: &mut Vec<Module>,
    read: &dyn Fn(&str) -> anyhow::Result<Option<Vec<u8>>>,
) -> anyhow::Result<()> {
    if ordered.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    if let Some(content) = read(name)? {
        for needed in needs(&content) {
            add(&needed, ordered, read)?;
        }
        ordered.push((name.to_owned(), content));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let read = |name: &str| {
            let needs = match name {
                "kvm_amd" => "kvm,ccp",
                "kvm" => "irqbypass",
                "virtio_net" => "net-failover,virtio",
                "virtio" => return Ok(None),
                _ => "",
            };
            Ok(Some(format!("x\0depends={needs}\0y").into_bytes()))
        };
        let mut ordered = Vec::new();
        for name in ["kvm_amd", "kvm", "virtio_net"] {
            add(name, &mut ordered, &read).unwrap();
        }
        let names: Vec<&str> = ordered.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [
            "irqbypass",
            "kvm",
            "ccp",
            "kvm_amd",
            "net_failover",
            "virtio_net",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_module_is_called_as_the_kernel_calls_it() {
        let name = |path: &str| name_of(Path::new(path));
        assert_eq!(name("a/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(name("a/ccp.ko").as_deref(), Some("ccp"));
        assert_eq!(name("a/notes.txt"), None);
    }
}
