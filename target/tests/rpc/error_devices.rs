//! `bdev_error_*`: what is taken, and what is refused. What it does to I/O is tested elsewhere.

use serde_json::{Value, json};

use crate::world::Client;

/// An error device on the device `m`, come and gone.
pub(crate) fn error_devices(rpc: &mut Client) {
    let create = "bdev_error_create";
    assert_eq!(rpc.ok(create, json!({ "base_name": "m" })), true);
    rpc.refused(create, json!({ "base_name": "m" }), -17, "EE_m");
    rpc.refused(create, json!({ "base_name": "nothing" }), -19, "nothing");
    let shown = rpc.ok("bdev_get_bdevs", json!({ "name": "EE_m" }));
    let disk = &shown[0]["driver_specific"]["error_disk"];
    assert_eq!(disk["base_bdev"], "m", "{shown}");
    assert_eq!(shown[0]["product_name"], "Error Injection Disk");

    let inject = "bdev_error_inject_error";
    let params = |io_type: &str, error_type: &str, more: Value| {
        let mut params = json!({ "name": "EE_m", "io_type": io_type, "error_type": error_type });
        let (Some(params_of), Value::Object(more)) = (params.as_object_mut(), more) else {
            unreachable!("both are objects")
        };
        params_of.extend(more);
        params
    };
    for (io_type, error_type, more) in [
        ("read", "failure", json!({})),
        ("all", "pending", json!({ "num": 3, "queue_depth": 8 })),
        (
            "write",
            "corrupt_data",
            json!({ "corrupt_offset": 1, "corrupt_value": 255, "num": 2 }),
        ),
        (
            "flush",
            "nvme_failure",
            json!({ "nvme_sct": 2, "nvme_sc": 0x81 }),
        ),
        ("unmap", "nomem", json!({ "num": null, "nvme_sct": null })),
        ("clear", "failure", json!({})),
    ] {
        let params = params(io_type, error_type, more);
        assert_eq!(rpc.ok(inject, params.clone()), true, "{params}");
    }
    for (io_type, error_type, more, code, words) in [
        ("write_zeroes", "failure", json!({}), -32602, "unmap, flush"),
        (
            "read",
            "timeout",
            json!({}),
            -32602,
            "corrupt_data or nomem",
        ),
        ("read", "corrupt_data", json!({}), -22, "`corrupt_value`"),
        (
            "read",
            "corrupt_data",
            json!({ "corrupt_value": 256 }),
            -22,
            "1 to 255",
        ),
        ("read", "nvme_failure", json!({}), -22, "other than 0"),
        (
            "read",
            "failure",
            json!({ "nvme_sc": 4 }),
            -22,
            "nothing else",
        ),
        (
            "read",
            "nvme_failure",
            json!({ "nvme_sct": 8 }),
            -32602,
            "from 0 to 7",
        ),
        ("read", "failure", json!({ "count": 1 }), -32602, "`count`"),
    ] {
        rpc.refused(inject, params(io_type, error_type, more), code, words);
    }
    let other = json!({ "name": "m", "io_type": "all", "error_type": "failure" });
    rpc.refused(inject, other, -19, "no error device");
    let resume = "bdev_error_resume_pending";
    assert_eq!(rpc.ok(resume, json!({ "name": "EE_m" })), true);
    rpc.refused(resume, json!({ "name": "m" }), -19, "no error device");

    let delete = "bdev_error_delete";
    rpc.refused(delete, json!({ "name": "m" }), -19, "no error device");
    assert_eq!(rpc.ok(delete, json!({ "name": "EE_m" })), true);
}
