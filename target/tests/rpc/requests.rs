//! What is a request, whose, and clients that misbehave.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_target::manage::{Management, ManagementError, SocketError};
use serde_json::{Value, json};

use crate::world::{Client, NQN, World, options, socket_in};

#[test]
fn what_is_no_request() {
    let world = World::new();
    // Not JSON: the answer says so, and the connection is closed, since nobody knows where the next
    // request would begin.
    for text in [
        "hello",
        "{\"a\":}",
        "{\"method\":\"x\"]",
        "\u{fffd}",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut client = world.client();
        let answer = client.ask(text);
        assert_eq!(answer["error"]["code"], -32700, "{text}: {answer}");
        assert_eq!(answer["id"], Value::Null);
        assert!(client.read().is_none(), "closed");
    }
    let mut client = world.client();
    let mut refused = |text: &str, code: i64, wanted: &str| {
        let answer = client.ask(text);
        let error = &answer["error"];
        assert_eq!(error["code"], code, "{text}: {answer}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(wanted), "{text}: {message}");
    };
    refused(r#"{"id":1}"#, -32600, "`method`");
    refused(r#"{"id":1,"method":7}"#, -32600, "`method`");
    refused(r#"{"id":[],"method":"x"}"#, -32600, "`id`");
    refused(
        r#"{"id":1,"jsonrpc":"1.0","method":"x"}"#,
        -32600,
        "`jsonrpc`",
    );
    refused(r#"{"id":1,"method":"x","params":3}"#, -32600, "`params`");
    refused(r#"{"id":1,"method":"x","extra":3}"#, -32600, "`extra`");
    refused(r#"{"id":1,"method":"bdev_none"}"#, -32601, "bdev_none");
    // Parameters: unknown, of a wrong type, missing, too large; always by name.
    let call =
        |method: &str, params: &str| format!(r#"{{"id":1,"method":"{method}","params":{params}}}"#);
    refused(&call("spdk_get_version", "[1]"), -32602, "object");
    refused(&call("spdk_get_version", r#"{"x":1}"#), -32602, "`x`");
    refused(
        &call("nvmf_delete_subsystem", "{}"),
        -32602,
        "`nqn` is missing",
    );
    refused(
        &call("nvmf_create_subsystem", r#"{"nqn":"x"}"#),
        -32602,
        "`nqn`",
    );
    let long = format!(r#"{{"nqn":"{NQN}","serial_number":"{}"}}"#, "x".repeat(21));
    refused(
        &call("nvmf_create_subsystem", &long),
        -32602,
        "`serial_number`",
    );
    let discovery = r#"{"nqn":"nqn.2014-08.org.nvmexpress.discovery"}"#;
    refused(
        &call("nvmf_create_subsystem", discovery),
        -32602,
        "discovery",
    );
    refused(
        &call("nvmf_delete_subsystem", discovery),
        -32602,
        "discovery",
    );
    let passthrough = format!(r#"{{"nqn":"{NQN}","passthrough":true}}"#);
    refused(
        &call("nvmf_create_subsystem", &passthrough),
        -32602,
        "`passthrough`",
    );
    let other = format!(r#"{{"nqn":"{NQN}","tgt_name":"second"}}"#);
    refused(&call("nvmf_delete_subsystem", &other), -32602, "second");
    let inner = format!(r#"{{"nqn":"{NQN}","namespace":{{"bdev_name":"m","nsid":"1"}}}}"#);
    refused(
        &call("nvmf_subsystem_add_ns", &inner),
        -32602,
        "`namespace.nsid`",
    );
    let unknown = format!(r#"{{"nqn":"{NQN}","namespace":{{"bdev_name":"m","color":1}}}}"#);
    refused(
        &call("nvmf_subsystem_add_ns", &unknown),
        -32602,
        "`namespace.color`",
    );
    for blocks in ["-1", "1.5", "18446744073709551616", "\"8\"", "[]"] {
        let params = format!(r#"{{"name":"m","block_size":512,"num_blocks":{blocks}}}"#);
        refused(&call("bdev_malloc_create", &params), -32602, "`num_blocks`");
    }
    for (size, blocks) in [(513, 8), (512, 0), (512, u64::MAX)] {
        let params = format!(r#"{{"name":"m","block_size":{size},"num_blocks":{blocks}}}"#);
        refused(&call("bdev_malloc_create", &params), -22, "");
    }
    let missing = r#"{"name":"f","filename":"/nonexistent/f.img"}"#;
    refused(&call("bdev_aio_create", missing), -2, "/nonexistent/f.img");
    refused(&call("bdev_get_bdevs", r#"{"name":"m"}"#), -19, "m");
    let odd = r#"{"type":"ram","name":"m","size":"1M","sizee":1}"#;
    refused(&call("flexblk_bdev_create", odd), -32602, "sizee");
    assert!(world.target.bdevs().is_empty());
    assert!(
        world
            .target
            .snapshot()
            .subsystems
            .iter()
            .all(Option::is_none)
    );
}

#[test]
fn batches_and_notifications() {
    let world = World::new();
    let mut client = world.client();
    let answers = client.ask(
        r#"[{"id":"a","method":"bdev_malloc_create","params":{"name":"m","block_size":512,"num_blocks":8}},
            {"method":"bdev_malloc_delete","params":{"name":"m"}},
            {"id":2,"method":"bdev_get_bdevs"}, 5, {"id":3,"method":"nope"}]"#,
    );
    let answers = answers.as_array().unwrap();
    assert_eq!(
        answers.len(),
        4,
        "a notification is done and not answered: {answers:?}"
    );
    assert_eq!(
        (&answers[0]["id"], &answers[0]["result"]),
        (&json!("a"), &json!("m"))
    );
    assert_eq!(
        (&answers[1]["id"], &answers[1]["result"]),
        (&json!(2), &json!([]))
    );
    assert_eq!(
        (&answers[2]["id"], &answers[2]["error"]["code"]),
        (&json!(null), &json!(-32600))
    );
    assert_eq!(
        (&answers[3]["id"], &answers[3]["error"]["code"]),
        (&json!(3), &json!(-32601))
    );
    assert_eq!(client.ask("[]")["error"]["code"], -32600);
    assert!(client.read().is_none());

    // Only notifications: no answer at all, and the next request has its own.
    let mut client = world.client();
    client.send(r#"[{"method":"rpc_get_methods"}]{"method":"rpc_get_methods"}"#);
    assert_eq!(
        client.ask(r#"{"id":9,"method":"framework_wait_init"}"#)["id"],
        9
    );
}

/// Requests in any pieces, and many in one piece, are answered in their order.
#[test]
fn fragments_and_pipelines() {
    let world = World::new();
    let mut client = world.client();
    let request = r#" {"jsonrpc":"2.0","id":1,"method":"framework_wait_init","params":{}}"#;
    for byte in request.as_bytes() {
        client.socket.write_all(std::slice::from_ref(byte)).unwrap();
    }
    assert_eq!(client.read().unwrap()["result"], true);
    let many: String = (0..300)
        .map(|id| format!("{{\"id\":{id},\"method\":\"framework_wait_init\"}}\n"))
        .collect();
    client.send(&many);
    for id in 0..300 {
        assert_eq!(client.read().unwrap()["id"], id);
    }
    // A client that says it has no more gets its answer all the same.
    client.send(request);
    client.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read().unwrap()["result"], true);
    assert!(client.read().is_none());
}

/// A thousand clients that say nothing, one in the middle of a request, one that does not read its
/// answers: nobody else waits for them. When all places are taken the one idle for longest goes.
#[test]
fn idle_and_slow_clients_are_in_nobodys_way() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let world = World::new();
    let mut idle: Vec<Client> = (0..1000).map(|_| world.client()).collect();
    idle[999].send("{\"id\":1,\"method\":\"");
    let mut deaf = world.client();
    let everything = "{\"id\":1,\"method\":\"flexblk_get_stats\"}".repeat(2000);
    deaf.socket.set_nonblocking(true).unwrap();
    // Fails when the server has stopped reading, as it should.
    let _ = deaf.socket.write_all(everything.as_bytes());

    let mut client = world.client();
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let began = Instant::now();
        client.ok("bdev_get_bdevs", json!({}));
        slowest = slowest.max(began.elapsed());
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    // All are still there: the first one is served.
    idle[0].ok("framework_wait_init", json!({}));

    // More than there are places for: those idle for longest make room, the busy one stays.
    let more: Vec<Client> = (0..100).map(|_| world.client()).collect();
    client.ok("framework_wait_init", json!({}));
    idle[0].ok("framework_wait_init", json!({}));
    assert!(idle[1].read().is_none(), "the one idle for longest");
    drop(more);
}

/// The socket is its owner's only; what a dead target left is replaced, a live one's is not touched.
#[test]
fn whose_socket_it_is() {
    let world = World::new();
    let path = socket_in(world.directory.path());
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = |path: &Path| {
        let options = options(path, &Arc::default(), &Arc::default());
        Management::start(&world.target, options)
    };
    let taken = again(&path).unwrap_err();
    assert!(
        matches!(taken, ManagementError::Socket(SocketError::InUse(_))),
        "{taken}"
    );
    world.client().ok("framework_wait_init", json!({}));

    let left = world.directory.path().join("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    assert!(left.exists());
    let management = again(&left).unwrap();
    Client::new(&left).ok("framework_wait_init", json!({}));
    drop(management);
    assert!(!left.exists(), "removed at the end");

    let file = world.directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(again(&file).unwrap_err().to_string().contains("no socket"));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert!(again(Path::new("/nonexistent/x.sock")).is_err());
    let long = world.directory.path().join("x".repeat(200));
    assert!(again(&long).is_err(), "longer than an address can be");
}
