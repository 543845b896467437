//! Links the binary at a fixed address: each pod has a helper process of this binary, and every relocation that the loader
//! would write is a private page in each of them. And folds functions whose machine code is the same: generic code has many.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-no-pie");
    println!("cargo:rustc-link-arg-bins=-Wl,--icf=all");
}
