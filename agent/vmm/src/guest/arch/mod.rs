//! Guest code by architecture, and nothing else outside the KVM backend's own façade asks for the
//! architecture.
//!
//! # Contract
//! `memstress` is memstress as machine code for [`Layout::CODE`](super::Layout::CODE). Where there
//! is none yet it is empty, and only the software backend runs memstress, which needs none. How
//! machine code calls out of the guest is the architecture's own: `x86_64` has ports.

#[cfg(not(target_arch = "x86_64"))]
mod none;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;

#[cfg(not(target_arch = "x86_64"))]
pub(super) use self::none::memstress;
#[cfg(target_arch = "x86_64")]
pub(super) use self::x86_64::memstress::bytes as memstress;
