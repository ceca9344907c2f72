//! The modules of a crate, and which of them a path leads to.
//!
//! What counts is the *file*: an inline module belongs to its file. A name that a module passes on
//! (`pub use`) leads to where it is defined, so `crate::Guard` is a use of `rcu` when `lib.rs` has
//! `pub use rcu::Guard`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::source::{self, Body};
use crate::workspace::Workspace;

/// A path through more names than this leads round in a circle.
const MAX_DEPTH: usize = 16;

/// One module.
#[derive(Debug)]
struct Node {
    name: String,
    /// Of the crate's root: itself.
    parent: usize,
    /// The module whose file this is in: itself, unless it is inline.
    file_node: usize,
    file: PathBuf,
    children: BTreeMap<String, usize>,
    body: Body,
}

/// All modules of a crate that are not for tests alone.
#[derive(Debug)]
pub(super) struct Modules(Vec<Node>);

/// One use of a file's module by another's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) from: Vec<String>,
    pub(super) to: Vec<String>,
    pub(super) file: PathBuf,
    pub(super) line: usize,
    /// Whether it only passes the name on.
    pub(super) is_export: bool,
}

/// Where a path leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    node: usize,
    /// Whether it ends at the module itself, not at an item in it.
    is_module: bool,
}

impl Modules {
    /// Reads a crate from its root file.
    ///
    /// # Errors
    /// When a file cannot be read, or is no Rust.
    pub(super) fn of(workspace: &Workspace, root: &Path) -> anyhow::Result<Self> {
        let read = |file: &Path| workspace.read(file);
        Self::read(root, &read)
    }

    /// The same, with files from anywhere.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub(super) fn read(
        root: &Path,
        read: &dyn Fn(&Path) -> anyhow::Result<String>,
    ) -> anyhow::Result<Self> {
        let mut modules = Self(Vec::new());
        let name = root.file_stem().unwrap_or_default().to_string_lossy();
        let folder = root.parent().unwrap_or(Path::new(""));
        modules.add_file(0, &name, root, folder, read)?;
        Ok(modules)
    }

    fn add_file(
        &mut self,
        parent: usize,
        name: &str,
        file: &Path,
        folder: &Path,
        read: &dyn Fn(&Path) -> anyhow::Result<String>,
    ) -> anyhow::Result<usize> {
        let body = source::read(&read(file)?).with_context(|| file.display().to_string())?;
        let own = self.0.len();
        self.add(parent, own, name, file, folder, body, read)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one recursion over files and inline modules"
    )]
    fn add(
        &mut self,
        parent: usize,
        file_node: usize,
        name: &str,
        file: &Path,
        folder: &Path,
        mut body: Body,
        read: &dyn Fn(&Path) -> anyhow::Result<String>,
    ) -> anyhow::Result<usize> {
        let own = self.0.len();
        let inline = std::mem::take(&mut body.inline);
        let files = std::mem::take(&mut body.files);
        self.0.push(Node {
            name: name.to_owned(),
            parent,
            file_node,
            file: file.to_owned(),
            children: BTreeMap::new(),
            body,
        });
        for (name, body) in inline {
            let inside = folder.join(&name);
            let child = self.add(own, file_node, &name, file, &inside, body, read)?;
            self.0[own].children.insert(name, child);
        }
        for (name, given) in files {
            let inside = folder.join(&name);
            let beside = file.parent().unwrap_or(Path::new(""));
            let mut places: Vec<PathBuf> = given.iter().map(|path| beside.join(path)).collect();
            // Of alternatives, for this platform or that, some may not be written yet.
            places.retain(|place| read(place).is_ok());
            if places.is_empty() {
                let plain = folder.join(format!("{name}.rs"));
                let is_plain = read(&plain).is_ok();
                places.push(if is_plain {
                    plain
                } else {
                    inside.join("mod.rs")
                });
            }
            for place in places {
                let child = self.add_file(own, &name, &place, &inside, read)?;
                self.0[own].children.insert(name.clone(), child);
            }
        }
        Ok(own)
    }

    /// Each file with what it says, inline modules included.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Path, &[usize])> {
        let files = self.0.iter().enumerate();
        files
            .filter(|(at, node)| node.file_node == *at)
            .map(|(_, node)| (node.file.as_path(), node.body.unsafe_lines.as_slice()))
    }

    /// The names of the modules that a module declares in files of their own; none when there is no
    /// such module.
    pub(super) fn children(&self, path: &[String]) -> Vec<&str> {
        let mut node = Some(0);
        for name in path {
            node = node.and_then(|at: usize| self.0[at].children.get(name).copied());
        }
        let children = node.map(|at| self.0[at].children.iter());
        let is_file = |(_, child): &(&String, &usize)| self.0[**child].file_node == **child;
        let names = children.into_iter().flatten().filter(is_file);
        names.map(|(name, _)| name.as_str()).collect()
    }

    /// The module's name at the root of all: `lib` or `main`.
    pub(super) fn root(&self) -> &str {
        &self.0[0].name
    }

    /// The path of a file's module, without the crate.
    fn path(&self, mut at: usize) -> Vec<String> {
        let mut path = Vec::new();
        while at != 0 {
            path.push(self.0[at].name.clone());
            at = self.0[at].parent;
        }
        path.reverse();
        path
    }

    /// All uses of one file's module by another's, each line once.
    pub(super) fn uses(&self) -> Vec<Use> {
        let mut found: Vec<Use> = Vec::new();
        for (at, node) in self.0.iter().enumerate() {
            for path in &node.body.uses {
                let Some(target) = self.resolve(at, &path.segments, 0) else {
                    continue;
                };
                let (from, to) = (node.file_node, self.0[target.node].file_node);
                // A module that is named to reach what is in it is no use of its own.
                if from == to || (target.is_module && self.is_above(to, from)) {
                    continue;
                }
                let new = Use {
                    from: self.path(from),
                    to: self.path(to),
                    file: node.file.clone(),
                    line: path.line,
                    is_export: path.is_export,
                };
                if !found.contains(&new) {
                    found.push(new);
                }
            }
        }
        found
    }

    fn is_above(&self, node: usize, mut below: usize) -> bool {
        while below != 0 {
            below = self.0[below].parent;
            if below == node {
                return true;
            }
        }
        false
    }

    /// Where a path leads that stands in a module; `None`: out of the crate, or to a local name.
    fn resolve(&self, from: usize, segments: &[String], depth: usize) -> Option<Target> {
        if depth > MAX_DEPTH {
            return None;
        }
        let (first, mut rest) = segments.split_first()?;
        let is_bare = !["crate", "self", "super"].contains(&first.as_str());
        let mut at = Target {
            node: match first.as_str() {
                "crate" => 0,
                "super" => self.0[from].parent,
                _ => from,
            },
            is_module: true,
        };
        if is_bare {
            at = match (
                self.0[from].children.get(first),
                self.0[from].body.aliases.get(first),
            ) {
                (Some(&node), _) => Target {
                    node,
                    is_module: true,
                },
                // A name that is defined in terms of itself (`use log::log`) is another crate's.
                (None, Some(alias)) if alias.first() != Some(first) => {
                    self.resolve(from, alias, depth + 1)?
                }
                _ => return None,
            };
            // An item's import was counted where it stands.
            if !at.is_module {
                return None;
            }
        }
        while let Some((name, next)) = rest.split_first().filter(|_| at.is_module) {
            rest = next;
            if name == "super" {
                at.node = self.0[at.node].parent;
                continue;
            }
            at = self.inside(at.node, name, depth);
        }
        Some(at)
    }

    /// Where a name of a module leads.
    fn inside(&self, node: usize, name: &str, depth: usize) -> Target {
        let here = &self.0[node];
        let own = Target {
            node,
            is_module: false,
        };
        if let Some(&node) = here.children.get(name) {
            return Target {
                node,
                is_module: true,
            };
        }
        if here.body.items.contains(name) || depth > MAX_DEPTH {
            return own;
        }
        if let Some(alias) = here.body.aliases.get(name) {
            return self.follow(node, alias, depth + 1).unwrap_or(own);
        }
        let through = |glob: &Vec<String>| {
            let target = self.follow(node, glob, depth + 1)?;
            let there = &self.0[target.node];
            let has = there.children.contains_key(name)
                || there.body.items.contains(name)
                || there.body.aliases.contains_key(name);
            has.then(|| self.inside(target.node, name, depth + 1))
        };
        here.body.globs.iter().find_map(through).unwrap_or(own)
    }

    /// As [`resolve`](Self::resolve), for the path behind a name: an item at its end counts.
    fn follow(&self, from: usize, segments: &[String], depth: usize) -> Option<Target> {
        let is_bare_item = segments.len() == 1;
        if is_bare_item && let Some(alias) = self.0[from].body.aliases.get(&segments[0]) {
            return (alias != segments)
                .then(|| self.resolve(from, alias, depth))
                .flatten();
        }
        self.resolve(from, segments, depth)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn modules(files: &[(&str, &str)]) -> Modules {
        let read = |file: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == file);
            found
                .map(|(_, text)| (*text).to_owned())
                .ok_or_else(|| anyhow!("no file {}", file.display()))
        };
        Modules::read(Path::new("src/lib.rs"), &read).unwrap()
    }

    fn shown(files: &[(&str, &str)]) -> Vec<String> {
        let show = |it: &Use| format!("{} -> {}", it.from.join("::"), it.to.join("::"));
        modules(files).uses().iter().map(show).collect()
    }

    #[test]
    fn paths_lead_to_the_files_that_define_what_they_name() {
        let files = [
            (
                "src/lib.rs",
                "mod a; mod b; mod c; pub use self::b::deep::Deep; pub use c::*; pub struct Own;",
            ),
            (
                "src/a.rs",
                "use crate::{b::deep, Deep, Of, Own, none::X};\nfn f() { deep::g(); super::c::h(); }",
            ),
            (
                "src/b/mod.rs",
                "pub mod deep; mod inline { use super::deep::Deep; }",
            ),
            (
                "src/b/deep.rs",
                "pub struct Deep; use std::fmt; use super::super::a;",
            ),
            ("src/c.rs", "pub struct Of; use crate::c::Of as Again;"),
        ];
        assert_eq!(
            shown(&files),
            [
                " -> b::deep",
                " -> c",
                "a -> b::deep",
                "a -> c",
                "a -> ",
                "a -> b::deep",
                "a -> c",
                "b -> b::deep",
                "b::deep -> a",
            ]
        );
    }

    #[test]
    fn a_name_for_a_module_above_is_only_a_way_to_what_is_in_it() {
        let files = [
            ("src/lib.rs", "mod a;"),
            ("src/a/mod.rs", "mod b; mod c; pub struct Own;"),
            ("src/a/b.rs", "use crate::a;\nfn f() { a::c::g(); }"),
            ("src/a/c.rs", "use super::Own;"),
        ];
        assert_eq!(shown(&files), ["a::b -> a::c", "a::c -> a"]);
        assert_eq!(modules(&files).children(&["a".to_owned()]), ["b", "c"]);
    }
}
