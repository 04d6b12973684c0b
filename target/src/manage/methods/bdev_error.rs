//! `bdev_error_*`: error devices, and what is injected into them while they run.

use std::num::NonZeroU8;

use flexblk_blockdev::{BdevConfig, FaultConfig, InjectOn, InjectedError, Injection, Injector};

use super::super::params::Params;
use super::bdev::{delete, named, refused};
use super::{Context, Method, Result, RpcError, change};
use crate::bdevs::Bdev;

pub(super) const METHODS: &[Method] = &[
    change("bdev_error_create", create),
    change("bdev_error_delete", |context, params| {
        delete(context, params, "error", |config| {
            matches!(config, BdevConfig::Fault(_))
        })
    }),
    change("bdev_error_inject_error", inject),
    change("bdev_error_resume_pending", resume),
];

/// The device that `bdev_error_create` makes. It has the name that SPDK gives it.
pub(super) fn config(mut params: Params) -> Result<BdevConfig> {
    let base_bdev_name: String = params.required("base_name")?;
    let uuid = params.optional("uuid")?;
    params.end()?;
    Ok(BdevConfig::Fault(FaultConfig {
        name: format!("EE_{base_bdev_name}"),
        base_bdev_name,
        uuid,
        seed: 0,
        read_error_rate: 0.0,
        write_error_rate: 0.0,
        flush_error_rate: 0.0,
        media_errors: Vec::new(),
    }))
}

fn create(context: &Context, params: Params) -> Result {
    let config = config(params)?;
    context.target.create_bdev(config).map_err(refused)?;
    Ok(true.into())
}

fn inject(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    let io_type: String = params.required("io_type")?;
    let types: &[InjectOn] = match io_type.as_str() {
        "clear" => &[],
        "read" => &[InjectOn::Read],
        "write" => &[InjectOn::Write],
        "unmap" => &[InjectOn::Unmap],
        "flush" => &[InjectOn::Flush],
        "all" => &InjectOn::ALL,
        _ => {
            let what = "clear, read, write, unmap, flush or all";
            return Err(params.wrong("io_type", what, &io_type.into()));
        }
    };
    let error = error(&mut params)?;
    let count: Option<u32> = params.optional("num")?;
    let queue_depth: Option<u64> = params.optional("queue_depth")?;
    params.end()?;
    let injection = Injection {
        error,
        count: count.unwrap_or(1),
        queue_depth: queue_depth.unwrap_or(0),
    };
    with_injector(&named(context, &name)?, |injector| match types {
        [] => injector.clear(),
        types => types.iter().for_each(|on| injector.inject(*on, &injection)),
    })
}

fn error(params: &mut Params) -> Result<InjectedError> {
    let word: String = params.required("error_type")?;
    let sct: u32 = params.optional("nvme_sct")?.unwrap_or(0);
    let sc: u32 = params.optional("nvme_sc")?.unwrap_or(0);
    let offset: Option<u64> = params.optional("corrupt_offset")?;
    let value: u32 = params.optional("corrupt_value")?.unwrap_or(0);
    let invalid = |what: &str| RpcError::errno(libc::EINVAL, what);
    let error = match word.as_str() {
        "failure" => InjectedError::Failure,
        "nvme_failure" => InjectedError::Nvme {
            sct: u8::try_from(sct)
                .ok()
                .filter(|sct| *sct < 8)
                .ok_or_else(|| params.wrong("nvme_sct", "a number from 0 to 7", &sct.into()))?,
            sc: u8::try_from(sc)
                .map_err(|_| params.wrong("nvme_sc", "a number from 0 to 255", &sc.into()))?,
        },
        "pending" => InjectedError::Pending,
        "nomem" => InjectedError::NoMemory,
        "corrupt_data" => {
            let value = u8::try_from(value).ok().and_then(NonZeroU8::new);
            let none = "`corrupt_value` is what the byte is changed by: 1 to 255";
            InjectedError::CorruptData {
                offset: offset.unwrap_or(0),
                value: value.ok_or_else(|| invalid(none))?,
            }
        }
        _ => {
            let what = "failure, nvme_failure, pending, corrupt_data or nomem";
            return Err(params.wrong("error_type", what, &word.into()));
        }
    };
    let has_status = (sct, sc) != (0, 0);
    if has_status != matches!(error, InjectedError::Nvme { .. }) {
        return Err(invalid(
            "`nvme_sct` and `nvme_sc` are the status of `nvme_failure`, which has one other than 0, \
             and of nothing else",
        ));
    }
    Ok(error)
}

fn resume(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    params.end()?;
    with_injector(&named(context, &name)?, Injector::resume)
}

fn with_injector(bdev: &Bdev, change: impl FnOnce(&Injector)) -> Result {
    let Some(injector) = bdev.device.injector() else {
        let what = format!("{} is no error device (bdev_error_create)", bdev.name());
        return Err(RpcError::errno(libc::ENODEV, what));
    };
    change(injector);
    Ok(true.into())
}
