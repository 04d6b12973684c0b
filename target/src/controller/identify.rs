//! Identify (Base 5.1.13): what host tools show about controller and namespaces.

use flexblk_blockdev::Caps;
use flexblk_nvme::command::admin::{Cns, ControllerList, Csi, Identify};
use flexblk_nvme::identify::descriptors::{self, Descriptor};
use flexblk_nvme::identify::{
    self, Anacap, CommandSetVectors, ControllerType, IndependentNamespace, NamespaceList, Nmic,
    Nsfeat, NvmController, NvmNamespace, Oaes, Oncs, PowerState, Sgls, Vwc,
};
use flexblk_nvme::log::discovery::TransportType;
use flexblk_nvme::{Nsid, Status, StatusCode, U16, U32, U64, U128};

use super::keep_alive::GRANULARITY_100MS;
use super::{Controller, Environment, Kind, MAX_ABORTS, MAX_EVENT_REQUESTS, properties};
use crate::association::ERROR_LOG_ENTRIES;
use crate::config::{MAX_ANA_GROUPS, MAX_NSID};
use crate::queue::request::{
    MAX_COPY_BYTES, MAX_COPY_RANGES, MAX_TRANSFER_BYTES, MAX_WRITE_ZEROES_BYTES,
};
use crate::snapshot::{Namespace, Subsystem};

/// Firmware revision: the crate's version.
pub(super) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// How long a group may be in the Change state (ANATT), in seconds.
const ANA_TRANSITION_S: u8 = 10;

/// Sizes in Identify are powers of two in units of the smallest page, 4 KiB.
const PAGE_SHIFT: u32 = 12;

impl Controller {
    /// The 4096 bytes, or the status that says why not.
    pub(super) fn identify(
        &self,
        identify: &Identify,
        environment: &Environment<'_>,
    ) -> Result<Vec<u8>, Status> {
        if self.kind == Kind::Discovery {
            // Base 3.1.3.3: of Identify a discovery controller has CNS 01h.
            return match identify.cns {
                Cns::Controller => Ok(self.identify_discovery(environment).bytes().to_vec()),
                _ => Err(StatusCode::InvalidField.dnr()),
            };
        }
        let subsystem = self.subsystem(environment)?;
        let nsid = identify.nsid;
        Ok(match identify.cns {
            Cns::Controller => self
                .identify_controller(subsystem, environment)
                .bytes()
                .to_vec(),
            Cns::Namespace => match self.active(subsystem, nsid)? {
                Some(namespace) => identify_namespace(namespace, environment.can_persist)
                    .bytes()
                    .to_vec(),
                None => zeros(),
            },
            Cns::ActiveNamespaces => self.list(subsystem, nsid)?,
            Cns::CommandSetActiveNamespaces if identify.csi == Csi::Nvm => {
                self.list(subsystem, nsid)?
            }
            Cns::NamespaceDescriptors => {
                // Base 5.1.13.2.3: an inactive namespace is Invalid Namespace or Format.
                let namespace = self.active(subsystem, nsid)?;
                let namespace =
                    namespace.ok_or_else(|| StatusCode::InvalidNamespaceOrFormat.dnr())?;
                descriptors_of(namespace)
            }
            Cns::CommandSetNamespace if identify.csi == Csi::Nvm => {
                self.active(subsystem, nsid)?;
                NvmNamespace::zeroed().bytes().to_vec()
            }
            Cns::CommandSetController if identify.csi == Csi::Nvm => nvm_controller(subsystem),
            // Base 5.1.13.2.6: a command set that is not supported has all zeros in 06h.
            Cns::CommandSetController if matches!(identify.csi, Csi::KeyValue | Csi::Zoned) => {
                zeros()
            }
            Cns::IndependentNamespace => match self.active(subsystem, nsid)? {
                Some(namespace) => independent(namespace, environment.can_persist)
                    .bytes()
                    .to_vec(),
                None => zeros(),
            },
            Cns::AttachedControllers => {
                self.active(subsystem, nsid)?;
                self.controllers(identify)
            }
            Cns::Controllers => self.controllers(identify),
            Cns::CommandSets => {
                let mut vectors = CommandSetVectors::zeroed();
                if let Some(first) = vectors.vector.first_mut() {
                    *first = U64::new(1); // bit 0: the NVM command set
                }
                vectors.bytes().to_vec()
            }
            _ => return Err(StatusCode::InvalidField.dnr()),
        })
    }

    /// This controller, if it is not below where the list starts. Dynamic controllers of other hosts
    /// are none of this host's business.
    fn controllers(&self, identify: &Identify) -> Vec<u8> {
        let mut list = ControllerList::zeroed();
        if self.association.cntlid >= identify.cntid {
            list.count = U16::new(1);
            if let Some(first) = list.cntlid.first_mut() {
                *first = U16::new(self.association.cntlid.get());
            }
        }
        list.bytes().to_vec()
    }

    /// The namespace if it is active and the host sees it, `None` if the identifier is valid and
    /// inactive (Base 3.2.1.2, 5.1.13.2: then the data is zeros). FFFFFFFFh is refused, as without
    /// Namespace Management.
    fn active<'a>(
        &self,
        subsystem: &'a Subsystem,
        nsid: Nsid,
    ) -> Result<Option<&'a Namespace>, Status> {
        if !(1..=MAX_NSID).contains(&nsid.get()) {
            return Err(StatusCode::InvalidNamespaceOrFormat.dnr());
        }
        let visible = subsystem.visible(nsid, &self.association.hostnqn);
        Ok(visible.map(|namespace| &**namespace))
    }

    /// Active namespaces above an identifier; FFFFFFFEh and FFFFFFFFh are Invalid Namespace or
    /// Format (Base 5.1.13.2.2).
    fn list(&self, subsystem: &Subsystem, after: Nsid) -> Result<Vec<u8>, Status> {
        if after >= Nsid::MAX {
            return Err(StatusCode::InvalidNamespaceOrFormat.dnr());
        }
        let visible = subsystem.visible_to(&self.association.hostnqn);
        let nsids = visible.map(|namespace| namespace.nsid);
        Ok(NamespaceList::above(after, nsids).bytes().to_vec())
    }

    /// What I/O and discovery controllers have in common.
    fn identify_common(&self, environment: &Environment<'_>) -> identify::Controller {
        let mut id = identify::Controller::zeroed();
        id.set_names("", "flexblk", FIRMWARE);
        id.mdts = (MAX_TRANSFER_BYTES.trailing_zeros() - PAGE_SHIFT) as u8;
        id.cntlid = U16::new(self.association.cntlid.get());
        id.ver = U32::new(properties::VERSION.into_bits());
        id.ctratt = U32::new(
            (identify::Ctratt::HOST_ID_128 | identify::Ctratt::TRAFFIC_BASED_KEEP_ALIVE).bits(),
        );
        id.aerl = (MAX_EVENT_REQUESTS - 1) as u8;
        id.elpe = (ERROR_LOG_ENTRIES - 1) as u8;
        id.lpa = identify::Lpa::EXTENDED.bits();
        id.kas = U16::new(GRANULARITY_100MS);
        id.maxcmd = U16::new(environment.directory.limits().queue_entries);
        let remote = match environment.transport {
            TransportType::Tcp => Sgls::TRANSPORT,
            _ => Sgls::KEYED,
        };
        id.sgls = U32::new((Sgls::SUPPORTED | Sgls::OFFSET | remote).bits());
        id.subnqn = self.association.subnqn.to_field();
        id
    }

    fn identify_discovery(&self, environment: &Environment<'_>) -> identify::Controller {
        let mut id = self.identify_common(environment);
        id.cntrltype = ControllerType::Discovery.raw();
        id.subnqn = environment.snapshot.discovery_nqn().to_field();
        id.oaes = U32::new(Oaes::DISCOVERY_LOG.bits());
        id
    }

    fn identify_controller(
        &self,
        subsystem: &Subsystem,
        environment: &Environment<'_>,
    ) -> identify::Controller {
        let mut id = self.identify_common(environment);
        id.set_names(&subsystem.serial, &subsystem.model, FIRMWARE);
        id.cntrltype = ControllerType::Io.raw();
        id.cmic =
            (identify::Cmic::MULTI_PORT | identify::Cmic::MULTI_CONTROLLER | identify::Cmic::ANA)
                .bits();
        id.oaes = U32::new((Oaes::NAMESPACE_ATTRIBUTE | Oaes::ANA_CHANGE).bits());
        id.anatt = ANA_TRANSITION_S;
        id.anacap = (Anacap::OPTIMIZED
            | Anacap::NON_OPTIMIZED
            | Anacap::INACCESSIBLE
            | Anacap::PERSISTENT_LOSS
            | Anacap::CHANGE
            | Anacap::GROUP_ID_STATIC)
            .bits();
        id.anagrpmax = U32::new(MAX_ANA_GROUPS);
        id.nanagrpid = U32::new(MAX_ANA_GROUPS);
        // Bit 0: Write Protect; 1: Until Power Cycle; 2: Permanent, which has to be saved.
        id.nwpc = if environment.can_persist {
            0b111
        } else {
            0b011
        };
        // How long a host waits before it repeats a command that found no memory: 100 ms.
        id.crdt1 = U16::new(1);
        id.acl = MAX_ABORTS - 1;
        // One firmware slot, read only.
        id.frmw = 0b0000_0011;
        id.lpa |=
            (identify::Lpa::EFFECTS | identify::Lpa::SUPPORTED_PAGES | identify::Lpa::TELEMETRY)
                .bits();
        id.tnvmcap = U128::new(
            subsystem
                .visible_to(&self.association.hostnqn)
                .map(|ns| u128::from(ns.info.size_bytes()))
                .sum(),
        );
        // Entries of 64 and 16 bytes, required and at most.
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn = U32::new(MAX_NSID);
        id.mnan = U32::new(MAX_NSID);
        id.oncs = U16::new(
            (Oncs::COMPARE
                | Oncs::DATASET_MANAGEMENT
                | Oncs::WRITE_ZEROES
                | Oncs::SAVE_SELECT
                | Oncs::VERIFY
                | Oncs::WRITE_UNCORRECTABLE
                | Oncs::COPY
                | Oncs::RESERVATIONS)
                .bits(),
        );
        // Bit 0: Compare and Write. ACWU stays 0: one block (NVM 4.1.5.2).
        id.fuses = U16::new(1);
        // Copy's source ranges in format 0h, and with Host Behavior Support 2h.
        id.cdfs = U16::new(1 << 0 | 1 << 2);
        let cache = if subsystem.has_write_cache() {
            Vwc::PRESENT
        } else {
            Vwc::empty()
        };
        id.vwc = (cache | Vwc::NO_BROADCAST_FLUSH).bits();
        id.set_in_capsule_bytes(environment.in_capsule_bytes);
        id.msdbd = 1;
        if let Some(state) = id.psd.first_mut() {
            *state = PowerState::zeroed();
        }
        id
    }
}

fn identify_namespace(namespace: &Namespace, can_persist: bool) -> identify::Namespace {
    let info = &namespace.info;
    let mut id = identify::Namespace::zeroed();
    id.set_blocks(info.block_count);
    id.set_single_format(namespace.block_shift());
    id.nmic = Nmic::SHARED.bits();
    id.rescap = rescap(can_persist);
    id.anagrpid = U32::new(namespace.anagrpid);
    id.nvmcap = U128::new(info.size_bytes().into());
    id.nguid = *namespace.uuid.as_bytes();
    id.nsattr = u8::from(namespace.read_only());
    let copy_blocks = MAX_COPY_BYTES >> namespace.block_shift();
    id.mssrl = U16::new(u16::try_from(copy_blocks).unwrap_or(u16::MAX));
    id.mcl = U32::new(copy_blocks);
    id.msrc = (MAX_COPY_RANGES - 1) as u8;
    if info.caps.contains(Caps::DISCARD) {
        // 2:0 001b: deallocated blocks read as zeros; bit 3: DEAC of Write Zeroes.
        id.dlfeat = u8::from(info.caps.contains(Caps::DISCARD_ZEROES)) | 1 << 3;
    }
    let optimal = info.optimal_io_bytes >> namespace.block_shift();
    if let Some(zeroes_based) = optimal
        .checked_sub(1)
        .and_then(|blocks| u16::try_from(blocks).ok())
    {
        id.nsfeat |= Nsfeat::OPTIMAL_PERFORMANCE.bits();
        let blocks = U16::new(zeroes_based);
        (id.npwg, id.npwa, id.npdg, id.npda, id.nows) = (blocks, blocks, blocks, blocks, blocks);
    }
    id
}

fn independent(namespace: &Namespace, can_persist: bool) -> IndependentNamespace {
    let mut id = IndependentNamespace::zeroed();
    // Bit 5: no volatile write cache.
    id.nsfeat = u8::from(!namespace.info.volatile_write_cache) << 5;
    id.nmic = Nmic::SHARED.bits();
    id.rescap = rescap(can_persist);
    id.anagrpid = U32::new(namespace.anagrpid);
    id.nsattr = u8::from(namespace.read_only());
    id.nstat = IndependentNamespace::READY;
    id
}

/// Reservation Capabilities: all six types and IEKEY as revision 1.3 has it; bit 0, persistence.
fn rescap(can_persist: bool) -> u8 {
    0xFE | u8::from(can_persist)
}

fn descriptors_of(namespace: &Namespace) -> Vec<u8> {
    let uuid = namespace.uuid;
    descriptors::emit(&[
        Descriptor::Nguid(*uuid.as_bytes()),
        Descriptor::Uuid(uuid),
        Descriptor::Csi(Csi::Nvm),
    ])
    .to_vec()
}

fn nvm_controller(subsystem: &Subsystem) -> Vec<u8> {
    let mut id = NvmController::zeroed();
    id.vsl = (MAX_TRANSFER_BYTES.trailing_zeros() - PAGE_SHIFT) as u8;
    id.wzsl = (MAX_WRITE_ZEROES_BYTES.trailing_zeros() - PAGE_SHIFT) as u8;
    if subsystem
        .active()
        .any(|namespace| namespace.info.caps.contains(Caps::DISCARD))
    {
        id.dmrl = u8::MAX;
        id.dmrsl = U32::new(u32::MAX);
        id.dmsl = U64::new(u64::from(u32::MAX) * 256);
    }
    id.bytes().to_vec()
}

fn zeros() -> Vec<u8> {
    vec![0; Identify::DATA_LEN]
}
