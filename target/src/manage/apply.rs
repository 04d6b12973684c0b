//! From what runs to what a configuration file says: the differences in plain words, and all of them
//! at once or none.

mod words;

use std::collections::BTreeSet;

use flexblk_blockdev::{BdevConfig, ByteSize};
use flexblk_nvme::{Nqn, Nsid};

use crate::bdevs::Bdev;
use crate::config::{self, AllowedHosts, Config, Discovery, ListenAddress};
use crate::draft::Draft;
use crate::error::NamespaceError;
use crate::snapshot::{Namespace, Snapshot, Subsystem};
use words::{States, hosts, latencies, listeners, referral};

/// One difference.
#[derive(Clone, Debug)]
enum Step {
    RemoveNamespace(Nqn, Nsid, String),
    RemoveSubsystem(Nqn),
    DeleteBdev(String),
    CreateBdev(Box<BdevConfig>),
    AddSubsystem(Box<config::Subsystem>),
    SetHosts(Nqn, AllowedHosts, AllowedHosts),
    SetListeners(Nqn, Option<Vec<ListenAddress>>, Option<Vec<ListenAddress>>),
    AddNamespace(Nqn, config::Namespace),
    SetNamespaceHosts(Nqn, Nsid, AllowedHosts, AllowedHosts),
    SetAnaGroup(Nqn, Nsid, u32, u32),
    SetAnaState {
        nqn: Nqn,
        group: u32,
        from: String,
        to: States,
    },
    SetDiscovery(Box<Discovery>, Vec<String>),
    Resize {
        name: String,
        from_bytes: u64,
        to_bytes: u64,
    },
    /// What of a device can change under I/O.
    Reconfigure(Box<BdevConfig>, Box<BdevConfig>),
}

/// What has to be done, and what cannot be while the target runs.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    steps: Vec<Step>,
    /// In plain words, one line each.
    pub(crate) impossible: Vec<String>,
}

impl Plan {
    /// The differences between a draft and a configuration. `running` is what the target was
    /// started with.
    pub(crate) fn new(draft: &Draft, running: &Config, wanted: &Config) -> Self {
        let mut plan = Self {
            steps: Vec::new(),
            impossible: fixed(running, wanted),
        };
        plan.bdevs(draft, wanted);
        plan.subsystems(draft, wanted);
        plan.discovery(&draft.snapshot.discovery, &wanted.discovery);
        // What goes makes room for what comes; a device is there before its namespace.
        plan.steps.sort_by_key(|step| match step {
            Step::RemoveNamespace(..) => 0,
            Step::RemoveSubsystem(_) => 1,
            Step::DeleteBdev(_) => 2,
            Step::CreateBdev(_) => 3,
            Step::AddSubsystem(_) => 4,
            Step::SetHosts(..) => 5,
            Step::SetListeners(..) => 6,
            Step::AddNamespace(..) => 7,
            Step::SetNamespaceHosts(..) => 8,
            Step::SetAnaGroup(..) => 9,
            Step::SetAnaState { .. } => 10,
            Step::SetDiscovery(..) => 11,
            Step::Resize { .. } => 12,
            Step::Reconfigure(..) => 13,
        });
        plan
    }

    /// In plain words, one line each, in the order in which they are done.
    pub(crate) fn lines(&self) -> Vec<String> {
        let lines = self.steps.iter().map(Step::line);
        lines
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    }

    /// Makes the changes on the draft. What reaches the devices themselves comes last; when one of
    /// these fails, those before it are taken back.
    pub(crate) fn carry_out(&self, draft: &mut Draft) -> Result<(), NamespaceError> {
        let mut back: Vec<Step> = Vec::new();
        for step in &self.steps {
            if let Err(error) = step.carry_out(draft) {
                for step in back.into_iter().rev() {
                    if let Err(error) = step.carry_out(draft) {
                        tracing::error!(%error, "not taken back: {}", step.line());
                    }
                }
                return Err(error);
            }
            back.extend(step.back());
        }
        Ok(())
    }

    fn bdevs(&mut self, draft: &Draft, wanted: &Config) {
        let gone = draft.bdevs.iter().rev().filter(|bdev| {
            let name = bdev.name();
            !bdev.implicit && wanted.bdevs.iter().all(|wanted| wanted.name() != name)
        });
        let gone: Vec<Step> = gone
            .map(|bdev| Step::DeleteBdev(bdev.name().to_owned()))
            .collect();
        self.steps.extend(gone);
        for config in &wanted.bdevs {
            let name = config.name();
            match draft.bdevs.iter().find(|bdev| bdev.name() == name) {
                None => self.steps.push(Step::CreateBdev(Box::new(config.clone()))),
                Some(bdev) => match compare(bdev, config) {
                    Same::Yes => {}
                    Same::Size(to_bytes) => self.resize(bdev, to_bytes),
                    Same::Latencies(to) => {
                        let from = Box::new(bdev.config.clone());
                        self.steps.push(Step::Reconfigure(from, to));
                    }
                    Same::No => self.impossible.push(format!(
                        "block device {name} cannot be changed into another; give the new one \
                         another name"
                    )),
                },
            }
        }
    }

    fn resize(&mut self, bdev: &Bdev, to_bytes: u64) {
        self.steps.push(Step::Resize {
            name: bdev.name().to_owned(),
            from_bytes: bdev.device.info().size_bytes(),
            to_bytes,
        });
    }

    fn subsystems(&mut self, draft: &Draft, wanted: &Config) {
        for subsystem in draft.snapshot.subsystems.iter().flatten() {
            if wanted
                .subsystems
                .iter()
                .all(|wanted| wanted.nqn != subsystem.nqn)
            {
                self.steps
                    .push(Step::RemoveSubsystem(subsystem.nqn.clone()));
            }
        }
        for subsystem in &wanted.subsystems {
            match draft.snapshot.find(&subsystem.nqn) {
                Some(current) => self.subsystem(draft, current, subsystem),
                None => {
                    self.steps
                        .push(Step::AddSubsystem(Box::new(subsystem.clone())));
                    let namespaces = numbered(&subsystem.namespaces).into_iter();
                    self.steps.extend(
                        namespaces
                            .map(|namespace| Step::AddNamespace(subsystem.nqn.clone(), namespace)),
                    );
                }
            }
        }
    }

    /// Who sees a namespace that stays, and its ANA group.
    fn access(&mut self, nqn: &Nqn, is: &Namespace, wanted: &config::Namespace) {
        if is.hosts != wanted.hosts {
            let (from, to) = (is.hosts.clone(), wanted.hosts.clone());
            let step = Step::SetNamespaceHosts(nqn.clone(), is.nsid, from, to);
            self.steps.push(step);
        }
        if is.anagrpid != wanted.anagrpid {
            let (from, to) = (is.anagrpid, wanted.anagrpid);
            self.steps
                .push(Step::SetAnaGroup(nqn.clone(), is.nsid, from, to));
        }
    }

    /// Where a subsystem that stays is reached.
    fn listeners(&mut self, snapshot: &Snapshot, current: &Subsystem, wanted: &config::Subsystem) {
        let is = current.listeners.as_ref().map(|ids| {
            let ports = ids.iter().filter_map(|id| snapshot.port(*id));
            ports.map(|port| port.listen).collect()
        });
        let sorted = |listeners: &Option<Vec<ListenAddress>>| {
            let mut listeners = listeners.clone();
            if let Some(listeners) = &mut listeners {
                listeners.sort_unstable();
            }
            listeners
        };
        if sorted(&is) != sorted(&wanted.listeners) {
            let to = wanted.listeners.clone();
            self.steps
                .push(Step::SetListeners(wanted.nqn.clone(), is, to));
        }
    }

    fn ana_states(&mut self, snapshot: &Snapshot, current: &Subsystem, wanted: &config::Subsystem) {
        let said = wanted.ana_groups.iter().map(|group| group.anagrpid);
        let known = current.ana_groups.iter().map(|group| group.id);
        let ids: BTreeSet<u32> = said.chain(known).collect();
        for id in ids {
            let to = States::wanted(&wanted.ana_groups, id);
            let is = current.ana_group(id);
            let is = is.map_or_else(States::default, |group| States::running(group, snapshot));
            if !is.says_the_same(&to) {
                self.steps.push(Step::SetAnaState {
                    nqn: wanted.nqn.clone(),
                    group: id,
                    from: is.to_string(),
                    to,
                });
            }
        }
    }

    fn discovery(&mut self, is: &Discovery, wanted: &Discovery) {
        if is == wanted {
            return;
        }
        let mut lines = Vec::new();
        if is.nqn != wanted.nqn {
            let name = |discovery: &Discovery| {
                let nqn = discovery.nqn.as_ref();
                nqn.map_or("none of its own".to_owned(), |nqn| nqn.as_str().to_owned())
            };
            let (from, to) = (name(is), name(wanted));
            lines.push(format!("~ name of the discovery service: {from} -> {to}"));
        }
        let gone = is.referrals.iter();
        let gone = gone.filter(|other| !wanted.referrals.contains(other));
        lines.extend(gone.map(|gone| referral('-', gone)));
        let new = wanted.referrals.iter();
        let new = new.filter(|other| !is.referrals.contains(other));
        lines.extend(new.map(|new| referral('+', new)));
        let (from, to) = (&is.listeners, &wanted.listeners);
        if from != to {
            let (from, to) = (listeners(Some(from)), listeners(Some(to)));
            lines.push(format!(
                "~ listeners of the discovery service: {from} -> {to}"
            ));
        }
        if lines.is_empty() {
            lines.push("~ order of the referrals".to_owned());
        }
        let step = Step::SetDiscovery(Box::new(wanted.clone()), lines);
        self.steps.push(step);
    }

    fn subsystem(&mut self, draft: &Draft, current: &Subsystem, wanted: &config::Subsystem) {
        let nqn = &wanted.nqn;
        for (what, is, wanted) in [
            ("serial", &current.serial, &wanted.serial),
            ("model", &current.model, &wanted.model),
        ] {
            if let Some(wanted) = wanted
                && **is != **wanted
            {
                self.impossible.push(format!(
                    "{what} of {} is \"{is}\" and stays while the subsystem exists, not \"{wanted}\"",
                    nqn.as_str()
                ));
            }
        }
        if current.hosts != wanted.hosts {
            let (from, to) = (current.hosts.clone(), wanted.hosts.clone());
            self.steps.push(Step::SetHosts(nqn.clone(), from, to));
        }
        self.listeners(&draft.snapshot, current, wanted);
        self.ana_states(&draft.snapshot, current, wanted);
        let namespaces = numbered(&wanted.namespaces);
        for namespace in current.active() {
            let nsid = namespace.nsid;
            if namespaces.iter().all(|wanted| wanted.nsid != Some(nsid)) {
                let name = namespace.info.name.to_string();
                self.steps
                    .push(Step::RemoveNamespace(nqn.clone(), nsid, name));
            }
        }
        for wanted in namespaces {
            let nsid = wanted.nsid.unwrap_or(Nsid::NONE);
            let Some(is) = current.namespace(nsid) else {
                self.steps.push(Step::AddNamespace(nqn.clone(), wanted));
                continue;
            };
            let bdev = draft.bdevs.iter().find(|bdev| bdev.id == is.device_id);
            let same = match bdev {
                Some(_) if wanted.uuid.is_some_and(|uuid| uuid != is.uuid) => Same::No,
                Some(bdev) if bdev.name() == wanted.bdev => Same::Yes,
                Some(bdev) if bdev.implicit => match wanted.bdev.parse::<BdevConfig>() {
                    Ok(config) => compare(bdev, &config),
                    Err(_) => Same::No,
                },
                _ => Same::No,
            };
            match (same, bdev) {
                (Same::Yes, _) => self.access(nqn, is, &wanted),
                (Same::Size(to_bytes), Some(bdev)) => {
                    self.resize(bdev, to_bytes);
                    self.access(nqn, is, &wanted);
                }
                _ => {
                    let name = is.info.name.to_string();
                    self.steps
                        .push(Step::RemoveNamespace(nqn.clone(), nsid, name));
                    self.steps.push(Step::AddNamespace(nqn.clone(), wanted));
                }
            }
        }
    }
}

impl Step {
    fn line(&self) -> String {
        match self {
            Self::SetNamespaceHosts(nqn, nsid, from, to) => {
                let (from, to) = (hosts(from), hosts(to));
                let nqn = nqn.as_str();
                format!("~ hosts of namespace {nsid} of {nqn}: {from} -> {to}")
            }
            Self::SetAnaGroup(nqn, nsid, from, to) => {
                let nqn = nqn.as_str();
                format!("~ ANA group of namespace {nsid} of {nqn}: {from} -> {to}")
            }
            Self::SetAnaState {
                nqn,
                group,
                from,
                to,
            } => {
                let nqn = nqn.as_str();
                format!("~ ANA group {group} of {nqn}: {from} -> {to}")
            }
            Self::SetListeners(nqn, from, to) => {
                let (from, to) = (listeners(from.as_ref()), listeners(to.as_ref()));
                format!("~ listeners of {}: {from} -> {to}", nqn.as_str())
            }
            Self::SetDiscovery(_, lines) => lines.join("\n"),
            Self::RemoveNamespace(nqn, nsid, bdev) => {
                format!("- namespace {} of {} (on {bdev})", nsid.get(), nqn.as_str())
            }
            Self::RemoveSubsystem(nqn) => {
                format!("- subsystem {} with its namespaces", nqn.as_str())
            }
            Self::DeleteBdev(name) => format!("- block device {name}"),
            Self::CreateBdev(config) => format!("+ block device {}", config.name()),
            Self::AddSubsystem(subsystem) => {
                let hosts = hosts(&subsystem.hosts);
                format!("+ subsystem {} for {hosts}", subsystem.nqn.as_str())
            }
            Self::SetHosts(nqn, from, to) => {
                let (from, to) = (hosts(from), hosts(to));
                format!("~ hosts of {}: {from} -> {to}", nqn.as_str())
            }
            Self::AddNamespace(nqn, namespace) => {
                let nsid = namespace.nsid.map_or(0, Nsid::get);
                format!(
                    "+ namespace {nsid} of {} on {}",
                    nqn.as_str(),
                    namespace.bdev
                )
            }
            Self::Resize {
                name,
                from_bytes,
                to_bytes,
            } => {
                let (from, to) = (ByteSize(*from_bytes), ByteSize(*to_bytes));
                format!("~ size of block device {name}: {from} -> {to}")
            }
            Self::Reconfigure(from, to) => {
                let (name, from, to) = (to.name(), latencies(from), latencies(to));
                format!("~ block device {name}: {from} -> {to}")
            }
        }
    }

    /// What takes a step back that reached a device itself.
    fn back(&self) -> Option<Self> {
        match self {
            Self::Resize {
                name,
                from_bytes,
                to_bytes,
            } => Some(Self::Resize {
                name: name.clone(),
                from_bytes: *to_bytes,
                to_bytes: *from_bytes,
            }),
            Self::Reconfigure(from, to) => Some(Self::Reconfigure(to.clone(), from.clone())),
            _ => None,
        }
    }

    fn carry_out(&self, draft: &mut Draft) -> Result<(), NamespaceError> {
        match self {
            Self::RemoveNamespace(nqn, nsid, _) => draft.remove_namespace(nqn, *nsid),
            Self::RemoveSubsystem(nqn) => draft.remove_subsystem(nqn),
            Self::DeleteBdev(name) => draft.delete_bdev(name),
            Self::CreateBdev(config) => draft
                .create_bdev(BdevConfig::clone(config), false)
                .map(|_| ()),
            Self::AddSubsystem(subsystem) => draft.add_subsystem(subsystem),
            Self::SetHosts(nqn, _, to) => draft.set_allowed_hosts(nqn, to.clone()),
            Self::AddNamespace(nqn, namespace) => draft.add_namespace(nqn, namespace).map(|_| ()),
            Self::Resize { name, to_bytes, .. } => resize(draft, name, *to_bytes),
            Self::Reconfigure(_, to) => draft.reconfigure_bdev(BdevConfig::clone(to)),
            Self::SetNamespaceHosts(nqn, nsid, _, to) => {
                draft.set_namespace_hosts(nqn, *nsid, to.clone())
            }
            Self::SetAnaGroup(nqn, nsid, _, to) => draft.set_ana_group(nqn, *nsid, *to),
            Self::SetAnaState { nqn, group, to, .. } => {
                draft.set_ana_state(nqn, Some(*group), None, to.all)?;
                for (listen, state) in &to.single {
                    let port = draft.port_of(nqn, listen)?;
                    draft.set_ana_state(nqn, Some(*group), Some(port), *state)?;
                }
                Ok(())
            }
            Self::SetListeners(nqn, _, to) => draft.set_listeners(nqn, to.as_deref()),
            Self::SetDiscovery(discovery, _) => draft.set_discovery(Discovery::clone(discovery)),
        }
    }
}

fn resize(draft: &mut Draft, name: &str, bytes: u64) -> Result<(), NamespaceError> {
    let bdev = draft.bdevs.iter().find(|bdev| bdev.name() == name);
    let bdev = bdev.ok_or_else(|| NamespaceError::NoBdev(name.to_owned()))?;
    bdev.device.resize(bytes)?;
    let id = bdev.id;
    draft.refresh(id);
    Ok(())
}

/// Is a device the one that a configuration describes?
enum Same {
    Yes,
    /// It is, but for its size.
    Size(u64),
    /// It is, but for its latencies; with those that are wanted.
    Latencies(Box<BdevConfig>),
    No,
}

fn compare(bdev: &Bdev, wanted: &BdevConfig) -> Same {
    let info = bdev.device.info();
    let in_place = match (&bdev.config, wanted) {
        (BdevConfig::Delay(is), BdevConfig::Delay(wanted)) => Some(is.with_latencies_of(wanted)),
        _ => None,
    };
    let mut is = bdev.config.clone();
    let mut wanted = wanted.clone();
    // A name that was made up may have got a number; an identity that is not asked for may be any.
    is.rename(wanted.name());
    let bytes = |size: Option<ByteSize>, blocks: Option<u64>, block_size: u32| {
        let counted = blocks.and_then(|blocks| blocks.checked_mul(block_size.into()));
        size.map(ByteSize::bytes).or(counted)
    };
    let wanted_bytes = match (&mut is, &mut wanted) {
        (BdevConfig::Ram(is), BdevConfig::Ram(wanted)) => {
            (is.size, is.num_blocks) = (None, None);
            is.uuid = wanted.uuid.map(|_| info.uuid);
            bytes(
                wanted.size.take(),
                wanted.num_blocks.take(),
                wanted.block_size,
            )
        }
        (BdevConfig::Null(is), BdevConfig::Null(wanted)) => {
            (is.size, is.num_blocks) = (None, None);
            is.uuid = wanted.uuid.map(|_| info.uuid);
            bytes(
                wanted.size.take(),
                wanted.num_blocks.take(),
                wanted.block_size,
            )
        }
        (BdevConfig::Delay(is), BdevConfig::Delay(wanted)) => {
            // The call that made it may have said what the file leaves to its default.
            for delay in [&mut *is, &mut *wanted] {
                delay.p99_read_latency.get_or_insert(delay.avg_read_latency);
                delay
                    .p99_write_latency
                    .get_or_insert(delay.avg_write_latency);
            }
            is.uuid = wanted.uuid.map(|_| info.uuid);
            if let Some(to) = in_place
                && is != wanted
                && is.with_latencies_of(wanted) == *wanted
            {
                return Same::Latencies(Box::new(BdevConfig::Delay(to)));
            }
            None
        }
        (BdevConfig::Fault(is), BdevConfig::Fault(wanted)) => {
            is.uuid = wanted.uuid.map(|_| info.uuid);
            None
        }
        (BdevConfig::File(is), BdevConfig::File(wanted)) => {
            is.uuid = wanted.uuid.map(|_| info.uuid);
            is.block_size = wanted.block_size.map(|_| info.block_size);
            None
        }
        _ => None,
    };
    match wanted_bytes {
        _ if is != wanted => Same::No,
        Some(bytes) if bytes != info.size_bytes() => Same::Size(bytes),
        _ => Same::Yes,
    }
}

/// The namespaces with the identifiers that a start would give them.
fn numbered(namespaces: &[config::Namespace]) -> Vec<config::Namespace> {
    let mut numbered: Vec<config::Namespace> = Vec::with_capacity(namespaces.len());
    for namespace in namespaces {
        let mut namespace = namespace.clone();
        if namespace.nsid.is_none() {
            namespace.nsid = (1..=config::MAX_NSID)
                .map(Nsid::new)
                .find(|nsid| numbered.iter().all(|other| other.nsid != Some(*nsid)));
        }
        numbered.push(namespace);
    }
    numbered
}

/// The NVMe/TCP listener, in the file's words.
fn tcp(config: &Config) -> String {
    let word = |digest| format!("{digest:?}").to_lowercase();
    config.tcp.map_or_else(
        || "off".to_owned(),
        |tcp| {
            let (header, data) = (word(tcp.header_digest), word(tcp.data_digest));
            let zerocopy = tcp.zerocopy_threshold.map_or_else(String::new, |bytes| {
                format!(", zero copy from {bytes} bytes")
            });
            format!(
                "{} (header digest {header}, data digest {data}{zerocopy})",
                tcp.address
            )
        },
    )
}

/// What is settled when the target starts.
fn fixed(running: &Config, wanted: &Config) -> Vec<String> {
    let shown = |config: &Config| {
        let listener = &config.listener;
        [
            ("[target] cores", format!("{:?}", config.cores)),
            (
                "[target] memory_budget",
                ByteSize(config.memory_budget_bytes).to_string(),
            ),
            (
                "[target] poll_budget_us",
                config.poll_budget.as_micros().to_string(),
            ),
            ("[target] limits", format!("{:?}", config.limits)),
            ("[listener] address", listener.address.to_string()),
            ("[listener] udp_port", listener.udp_port.to_string()),
            ("[listener] mtu", format!("{:?}", listener.mtu)),
            ("[listener] tx", format!("{:?}", listener.tx)),
            ("[listener] rx", format!("{:?}", listener.rx)),
            ("[listener] digest", format!("{:?}", listener.digest)),
            ("[listener] fault", format!("{:?}", listener.fault)),
            ("[listener] capture", format!("{:?}", listener.capture)),
            ("[tcp]", tcp(config)),
        ]
    };
    // What the file does not say may have come from a flag.
    let unsaid = shown(&Config::default());
    let pairs = shown(running).into_iter().zip(shown(wanted));
    pairs
        .zip(unsaid)
        .filter(|(((_, is), (_, wanted)), (_, unsaid))| is != wanted && wanted != unsaid)
        .map(|(((key, is), (_, wanted)), _)| {
            format!("{key} is {is} and settled when the target starts, not {wanted}")
        })
        .collect()
}
