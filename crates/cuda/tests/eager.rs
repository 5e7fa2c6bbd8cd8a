//! Eager loading is asked for in a process that has one thread: this one, without a test harness.

use std::env;
use std::process::Command;

use tierstream_cuda::load_modules_eagerly;

const VARIABLE: &str = "CUDA_MODULE_LOADING";

fn main() {
    match env::args().nth(1).as_deref() {
        Some("unset") => {
            assert!(load_modules_eagerly());
            assert_eq!(env::var(VARIABLE).as_deref(), Ok("EAGER"));
            assert!(load_modules_eagerly());
        }
        Some("lazy") => {
            assert!(!load_modules_eagerly());
            assert_eq!(env::var(VARIABLE).as_deref(), Ok("LAZY"));
        }
        // From the test runner, whatever the environment is.
        _ => {
            let this = env::current_exe().unwrap();
            let run = |case: &str, command: &mut Command| {
                assert!(command.arg(case).status().unwrap().success(), "{case}");
            };
            run("unset", Command::new(&this).env_remove(VARIABLE));
            run("lazy", Command::new(&this).env(VARIABLE, "LAZY"));
        }
    }
}
