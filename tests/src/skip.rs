//! Tests that this machine cannot run say so, and are counted.

use std::io::Write as _;

/// Notes that a test was skipped and why. `cargo xtask test` reads the notes from `FLEXBLK_SKIP_FILE` and counts them.
pub fn note(test: &str, reason: &str) {
    eprintln!("SKIPPED {test}: {reason}");
    if let Some(path) = std::env::var_os("FLEXBLK_SKIP_FILE") {
        let line = format!("SKIPPED {test}: {reason}\n");
        let noted = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        if let Err(error) = noted {
            panic!("{}: {error}", path.display());
        }
    }
}

/// Whether fio is there; notes the skip when it is not.
pub fn without_fio(test: &str) -> bool {
    let missing = crate::process::find_program("fio").is_err();
    if missing {
        note(test, "fio is not installed (apt-get install fio)");
    }
    missing
}
