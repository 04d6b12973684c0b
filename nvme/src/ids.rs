//! Identifiers as types, so that a queue is never taken for a command or a namespace.

use core::fmt;

use uuid::Uuid;

macro_rules! id {
    ($(#[$meta:meta])* $name:ident($inner:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name($inner);

        impl $name {
            /// Wraps the number as it stands on the wire.
            #[inline]
            #[must_use]
            pub const fn new(value: $inner) -> Self {
                Self(value)
            }

            /// The number as it stands on the wire.
            #[inline]
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }

        impl From<$name> for $inner {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

id!(
    /// Command identifier (CID), unique among a submission queue's outstanding commands.
    Cid(u16)
);
id!(
    /// Namespace identifier (NSID); 0 means none, `FFFFFFFFh` all.
    Nsid(u32)
);
id!(
    /// Queue identifier (QID); 0 is the Admin queue.
    Qid(u16)
);
id!(
    /// Controller identifier (CNTLID).
    Cntlid(u16)
);
id!(
    /// Logical block address.
    Lba(u64)
);

impl Nsid {
    /// No namespace: commands that do not use one.
    pub const NONE: Self = Self(0);
    /// All namespaces attached to the controller.
    pub const BROADCAST: Self = Self(0xFFFF_FFFF);
    /// Highest identifier a namespace can have.
    pub const MAX: Self = Self(0xFFFF_FFFE);

    /// Names a single namespace (neither none nor broadcast).
    #[inline]
    #[must_use]
    pub const fn is_single(self) -> bool {
        self.0 != 0 && self.0 <= Self::MAX.0
    }
}

impl Qid {
    /// The Admin queue.
    pub const ADMIN: Self = Self(0);

    /// Is this the Admin queue?
    #[inline]
    #[must_use]
    pub const fn is_admin(self) -> bool {
        self.0 == 0
    }
}

impl Cntlid {
    /// In a Connect command: the controller is to be chosen by the target (Base 3.1.2, 6.3).
    pub const DYNAMIC: Self = Self(0xFFFF);
    /// In a Connect command: any statically allocated controller.
    pub const STATIC_ANY: Self = Self(0xFFFE);
    /// Highest identifier a controller can have (FFF0h and up are reserved).
    pub const MAX: Self = Self(0xFFEF);
}

/// Host identifier (HOSTID), 128 bits, an RFC 9562 UUID. The wire carries its bytes in UUID order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub Uuid);

impl HostId {
    /// From the 16 bytes of a Connect command's data or a Host Identifier feature.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes as they go on the wire.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }

    /// A fresh random identifier.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Uuid> for HostId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl core::str::FromStr for HostId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}
