//! Why there is no KVM on a host, and what its operator can do about it.

/// Of `KVM_GET_API_VERSION` since Linux 2.6.22.
pub(super) const API_VERSION: i32 = 12;

/// Why there is no KVM here. Each has its words for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KvmUnavailable {
    /// No such file.
    #[error("{device} is not there")]
    Missing {
        /// Its path.
        device: String,
    },
    /// A file without a driver behind it.
    #[error("{device} has no driver behind it")]
    NoDriver {
        /// Its path.
        device: String,
    },
    /// This user may not open it for reading and writing.
    #[error("{device}: permission denied")]
    Denied {
        /// Its path.
        device: String,
    },
    /// As before, and its permissions give its group nothing, so that no membership helps.
    #[error("{device}: permission denied, its mode is {mode:04o}")]
    DeniedToGroup {
        /// Its path.
        device: String,
        /// Its permissions.
        mode: u32,
    },
    /// Something else is in its place.
    #[error("{device} is no KVM: asked for KVM's version it says {said}")]
    NotKvm {
        /// Its path.
        device: String,
        /// What the kernel said.
        said: String,
    },
    /// A KVM that Slat does not know.
    #[error("{device} speaks version {version} of KVM's interface, and Slat speaks {API_VERSION}")]
    Version {
        /// Its path.
        device: String,
        /// What it said.
        version: i32,
    },
    /// The processors' virtualisation is in somebody else's hands.
    #[error("another hypervisor has this host's processors, so KVM makes no VM")]
    Busy,
}

impl KvmUnavailable {
    /// What to do about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "load KVM's module (kvm_intel, kvm_amd; on RISC-V the kernel must have CONFIG_KVM) and switch \
                 virtualisation on in the firmware; in a container pass the device in, in a VM switch nested \
                 virtualisation on"
            }
            Self::NoDriver { .. } => {
                "load KVM's module (kvm_intel, kvm_amd); when it does not load, the kernel's log says why, mostly \
                 that virtualisation is off in the firmware"
            }
            Self::Denied { .. } => {
                "add the agent's user to the group that owns the device, mostly kvm, and start the agent again; in a \
                 container or unit also allow the device itself"
            }
            Self::DeniedToGroup { .. } => {
                "let the group that owns the device read and write it (chmod g+rw, and a rule of udev so that it stays \
                 so), and put the agent's user into that group"
            }
            Self::Version { .. } | Self::NotKvm { .. } => {
                "put the kernel's own KVM device back in that place"
            }
            Self::Busy => {
                "stop the other one (VirtualBox, VMware, a second KVM module) and unload its module; the agent \
                 finds KVM by itself then"
            }
        }
    }

    /// The same in one word, for programs.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "missing",
            Self::NoDriver { .. } => "no-driver",
            Self::Denied { .. } | Self::DeniedToGroup { .. } => "denied",
            Self::Version { .. } | Self::NotKvm { .. } => "version",
            Self::Busy => "busy",
        }
    }
}
