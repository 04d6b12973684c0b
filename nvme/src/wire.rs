//! The macro with which structures of the specification are written down: every field carries its
//! byte offset as the figure gives it, and the compiler checks all of them and the total size.

/// Declares a byte-exact, alignment-free structure.
///
/// Each field is `offset => name: type`; a wrong offset or size is a compile error. The structure
/// gets `SIZE`, `zeroed()`, `view()` (checked borrow of the front of a byte slice), `Default`
/// (all zero) and zerocopy's `as_bytes()`.
macro_rules! wire {
    ($(#[$meta:meta])* pub struct $name:ident: $size:literal {
        $($(#[$field_meta:meta])* $offset:literal => $vis:vis $field:ident: $ty:ty,)+
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout,
            zerocopy::Immutable, zerocopy::Unaligned,
        )]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_meta])* $vis $field: $ty,)+
        }

        const _: () = {
            assert!(size_of::<$name>() == $size, concat!("size of ", stringify!($name)));
            $(assert!(
                core::mem::offset_of!($name, $field) == $offset,
                concat!("offset of ", stringify!($name), ".", stringify!($field))
            );)+
        };

        impl $name {
            /// Length in bytes.
            pub const SIZE: usize = $size;

            /// All bytes zero.
            #[must_use]
            pub fn zeroed() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }

            /// The structure at the front of `bytes`; `None` when they are fewer than `SIZE`.
            #[inline]
            #[must_use]
            pub fn view(bytes: &[u8]) -> Option<&Self> {
                <Self as zerocopy::FromBytes>::ref_from_prefix(bytes).ok().map(|(view, _)| view)
            }

            /// The bytes as they go on the wire.
            #[inline]
            #[must_use]
            pub fn bytes(&self) -> &[u8] {
                zerocopy::IntoBytes::as_bytes(self)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::zeroed()
            }
        }
    };
}

/// Declares an enumeration of one-byte values that keeps the values it does not know.
macro_rules! open_enum {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident = $raw:literal,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)+
            /// A value without a meaning here.
            Other(u8),
        }

        impl $name {
            /// All values that have a meaning here.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The meaning of the byte.
            #[inline]
            #[must_use]
            pub const fn from_raw(raw: u8) -> Self {
                match raw {
                    $($raw => Self::$variant,)+
                    other => Self::Other(other),
                }
            }

            /// The byte.
            #[inline]
            #[must_use]
            pub const fn raw(self) -> u8 {
                match self {
                    $(Self::$variant => $raw,)+
                    Self::Other(raw) => raw,
                }
            }
        }

        impl From<u8> for $name {
            fn from(raw: u8) -> Self {
                Self::from_raw(raw)
            }
        }

        impl From<$name> for u8 {
            fn from(value: $name) -> Self {
                value.raw()
            }
        }
    };
}
