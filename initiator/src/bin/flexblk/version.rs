//! `flexblk version`.

use anyhow::Result;

/// Prints the version and what the kernel offers.
pub(crate) fn version() -> Result<()> {
    println!("flexblk {}", env!("CARGO_PKG_VERSION"));
    match flexblk_initiator::Host::load() {
        Ok(host) => println!("host NQN  {}\nhost id   {}", host.hostnqn, host.hostid),
        Err(error) => println!("host NQN  {error}"),
    }
    match flexblk_reactor::Reactor::new(&flexblk_reactor::Config::default()) {
        Ok(reactor) => println!("io_uring  {:?}", reactor.features()),
        Err(error) => println!("io_uring  {error}"),
    }
    Ok(())
}
