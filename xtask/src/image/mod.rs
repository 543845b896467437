//! Builds the images of the examples and tests from Debian packages: no container tool, no registry.
//!
//! An image is a function of its recipe and of the packages, byte for byte: entries are sorted and carry no time.

mod archive;
pub mod debian;
mod recipes;
pub mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::shell;
use recipes::{RECIPES, Recipe};

pub fn run(_args: &[String]) -> Result<()> {
    for recipe in RECIPES {
        let built = build(recipe)?;
        println!("image: {} in {}", recipe.name, built.strip_prefix(shell::root()).unwrap_or(&built).display());
    }
    Ok(())
}

/// Where the archive of an image lies: `nginx:test1` becomes `target/images/nginx-test1.tar`.
pub fn archive_path(name: &str) -> Result<PathBuf> {
    Ok(images_dir()?.join(format!("{}.tar", name.replace([':', '/'], "-"))))
}

fn images_dir() -> Result<PathBuf> {
    Ok(shell::target_dir()?.join("images"))
}

fn build(recipe: &Recipe) -> Result<PathBuf> {
    let path = archive_path(recipe.name)?;
    let stamp = path.with_extension("recipe");
    let key = key();
    if path.is_file() && fs::read_to_string(&stamp).is_ok_and(|held| held == key) {
        return Ok(path);
    }
    let dir = images_dir()?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut packages = debian::Packages::new(dir.join("packages"))?;
    let tree = (recipe.tree)(&mut packages).with_context(|| format!("cannot build {}", recipe.name))?;
    let image = archive::pack(recipe, tree.layer()?, &packages.architecture)?;
    replace(&path, &image)?;
    replace(&stamp, key.as_bytes())?;
    Ok(path)
}

/// The cache's key: whatever decides the bytes of an image, which is the source in this directory.
fn key() -> String {
    let sources = [
        include_str!("mod.rs"),
        include_str!("archive.rs"),
        include_str!("debian.rs"),
        include_str!("recipes.rs"),
        include_str!("tree.rs"),
    ];
    hex(sources.concat().as_bytes())
}

pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A reader sees the old file or the new one, never half of it.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let half = path.with_extension("tmp");
    fs::write(&half, bytes).with_context(|| format!("cannot write {}", half.display()))?;
    fs::rename(&half, path).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::archive_path;

    #[test]
    fn an_image_name_becomes_a_file_name() {
        let path = archive_path("nginx:test1").expect("cargo knows its target directory");
        assert!(path.ends_with("images/nginx-test1.tar"), "{}", path.display());
    }
}
