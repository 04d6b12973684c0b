//! Command and response capsules, and the data that commands carry: nothing panics, and what is
//! understood means the same after it was emitted again.

#![no_main]

use flexblk_nvme::command::fabrics::{self, ConnectData};
use flexblk_nvme::command::nvm::{self, DsmRange};
use flexblk_nvme::{Command, Cqe, QueueKind, Sgl, Sqe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|capsule: &[u8]| {
    if let Some((bytes, _)) = capsule.split_first_chunk() {
        let cqe = Cqe::from_bytes(bytes);
        assert_eq!(&cqe.to_bytes(), bytes);
        let _ = (cqe.cid(), cqe.status().to_string());
    }
    let Some((sqe, data)) = Sqe::split(capsule) else {
        return;
    };
    let _ = (sqe.check_flags(), sqe.fuse(), sqe.data_transfer());
    let sgl = sqe.sgl();
    if let Ok(sgl) = sgl {
        assert_eq!(Sgl::parse(&sgl.emit()), Ok(sgl));
    }
    for queue in [QueueKind::Admin, QueueKind::Io] {
        let Ok(command) = Command::parse(queue, sqe) else {
            continue;
        };
        let emitted = command.emit(sqe.cid(), &sgl.unwrap_or(Sgl::NONE));
        let again = Sqe::cast(&emitted);
        assert_eq!(Command::parse(queue, again), Ok(command));
        assert_eq!(again.cid(), sqe.cid());
        match command {
            Command::Nvm(nvm::Command::DatasetManagement(dsm)) => {
                if let Some(ranges) = DsmRange::list(data, dsm.ranges) {
                    assert_eq!(ranges.len(), usize::from(dsm.ranges));
                }
            }
            Command::Nvm(nvm::Command::Read(read)) => {
                let _ = read.last_lba();
            }
            Command::Fabrics(fabrics::Command::Connect(connect)) => {
                let _ = connect.check();
                if let Some(data) = ConnectData::view(data) {
                    let _ = (data.hostid(), data.subnqn(), data.hostnqn());
                }
            }
            _ => {}
        }
    }
});
