//! The binary.

fn main() -> std::process::ExitCode {
    fairlead::main()
}
