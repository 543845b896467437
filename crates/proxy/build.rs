//! Compiles the programs of the ebpf mode.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const SOURCES: &str = "src/dataplane/ebpf";

fn main() {
    println!("cargo:rerun-if-changed={SOURCES}");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CLANG");
    let clang = find_clang().unwrap_or_else(|| panic!("the ebpf programs need clang 14 or newer; run `make deps`"));
    let object = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("proxy.bpf.o");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let endian = match env::var("CARGO_CFG_TARGET_ENDIAN").expect("cargo sets it").as_str() {
        "big" => "bpfeb",
        _ => "bpfel",
    };
    let status = Command::new(&clang)
        .current_dir(SOURCES)
        // -g gives BTF, which the map definitions are; no path of this machine goes into it.
        .args(["-O2", "-g", "-fdebug-compilation-dir=.", "-Wall", "-Werror", "-Wno-unused-const-variable"])
        .args(["-target", endian, "-mcpu=v3"])
        // Where Debian keeps <asm/types.h>, which the kernel's headers include.
        .arg(format!("-I/usr/include/{arch}-linux-gnu"))
        .args(["-c", "proxy.c", "-o"])
        .arg(&object)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{clang} failed on {SOURCES}/proxy.c: {status}"),
        Err(error) => panic!("cannot run {clang}: {error}; run `make deps`"),
    }
}

/// `$CLANG`, or the newest one there is.
fn find_clang() -> Option<String> {
    if let Ok(clang) = env::var("CLANG") {
        return Some(clang);
    }
    let names = ["clang".to_owned()].into_iter().chain((14..=30).rev().map(|version| format!("clang-{version}")));
    let folders: Vec<PathBuf> = env::split_paths(&env::var_os("PATH")?).collect();
    names.into_iter().find(|name| folders.iter().any(|folder| fs::metadata(folder.join(name)).is_ok()))
}
