//! Tests that this machine cannot run say so, and are counted.

use std::io::Write as _;

/// Notes that a test was skipped and why. `cargo xtask test` reads the notes from `FLEXBLK_SKIP_FILE` and counts them.
pub fn note(test: &str, reason: &str) {
    write(&format!("SKIPPED {test}: {reason}"));
}

/// Notes that a part of a test was skipped, while the rest of it runs and is counted for itself.
pub fn note_part(part: &str, reason: &str) {
    write(&format!("SKIPPED part of {part}: {reason}"));
}

fn write(line: &str) {
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("FLEXBLK_SKIP_FILE") {
        let noted = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
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
