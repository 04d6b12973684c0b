//! An image and a state file that outlive a target.

use crate::world::World;

/// An image and a state file, which a target finds again when it is started again.
pub(crate) struct Kept {
    pub(crate) _directory: tempfile::TempDir,
    pub(crate) bdev: String,
    pub(crate) state: std::path::PathBuf,
}

impl Kept {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        std::fs::write(&image, vec![0; 4 << 20]).unwrap();
        Self {
            bdev: format!("file:{},block_size=4096", image.display()),
            state: directory.path().join("ptpl.json"),
            _directory: directory,
        }
    }

    pub(crate) fn start(&self) -> World {
        World::with(&[&self.bdev], |config| {
            config.ptpl_file = Some(self.state.clone());
        })
    }
}
