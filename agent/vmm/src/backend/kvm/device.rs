//! `/dev/kvm` itself: opened, asked for its version, made to make VMs; and what to do where that
//! fails.

use std::{ffi::CStr, io, os::unix::fs::PermissionsExt as _, path::Path};

use kvm_ioctls::{Kvm, VmFd};

use super::{
    super::{BackendError, KvmUnavailable, unavailable::API_VERSION},
    refuse::failed,
};

/// Where it is on every host.
pub(super) const DEVICE: &CStr = c"/dev/kvm";
/// How often a call that a signal interrupted is made again.
const INTERRUPTIONS: u32 = 100;

/// Opens the device and checks its version.
pub(super) fn open(path: &CStr) -> Result<Kvm, BackendError> {
    let kvm = Kvm::new_with_path(path).map_err(|error| not_opened(path, error.errno()))?;
    let version = kvm.get_api_version();
    if version < 0 {
        // Nothing was asked of the kernel since.
        let said = io::Error::last_os_error().to_string();
        let device = shown(path);
        return Err(KvmUnavailable::NotKvm { device, said }.into());
    }
    if version != API_VERSION {
        let device = shown(path);
        return Err(KvmUnavailable::Version { device, version }.into());
    }
    Ok(kvm)
}

fn shown(path: &CStr) -> String {
    path.to_string_lossy().into_owned()
}

fn not_opened(path: &CStr, errno: i32) -> BackendError {
    let device = shown(path);
    match errno {
        libc::ENOENT => KvmUnavailable::Missing { device }.into(),
        libc::ENODEV | libc::ENXIO => KvmUnavailable::NoDriver { device }.into(),
        libc::EACCES | libc::EPERM => match mode(&device) {
            Some(mode) if mode & 0o060 != 0o060 => {
                KvmUnavailable::DeniedToGroup { device, mode }.into()
            }
            _ => KvmUnavailable::Denied { device }.into(),
        },
        _ => BackendError::Ioctl {
            op: "opening /dev/kvm",
            source: io::Error::from_raw_os_error(errno),
        },
    }
}

/// The permissions of a device's file.
fn mode(device: &str) -> Option<u32> {
    let file = Path::new(device).metadata().ok()?;
    Some(file.permissions().mode() & 0o7777)
}

/// An empty VM.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, BackendError> {
    uninterrupted(|| kvm.create_vm()).map_err(not_made)
}

fn not_made(error: kvm_ioctls::Error) -> BackendError {
    match error.errno() {
        libc::EBUSY => KvmUnavailable::Busy.into(),
        _ => failed("KVM_CREATE_VM")(error),
    }
}

/// Makes a call again that a signal interrupted, or that asks for it, so often and no more.
pub(super) fn uninterrupted<T>(
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    for _ in 1..INTERRUPTIONS {
        match call() {
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
    call()
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use slat_proto::{ApiError, Reason};

    use super::*;

    /// Why there is none, as a caller of the API is told.
    fn told(error: BackendError) -> ApiError {
        let BackendError::NoKvm(why) = &error else {
            panic!("{error}");
        };
        let (word, advice) = (why.word(), why.advice());
        let told = ApiError::from(error);
        assert_eq!(told.reason, Reason::KvmUnavailable);
        assert_eq!(told.metadata["why"], word);
        assert_eq!(told.metadata["advice"], advice);
        told
    }

    #[test]
    fn a_device_that_is_missing_or_no_kvm_is_told_apart() {
        let folder = slat_test_dir::TestDir::new();
        let path = folder.path().join("kvm");
        let device = CString::new(path.to_str().unwrap()).unwrap();
        let missing = told(open(&device).unwrap_err());
        assert_eq!(missing.metadata["why"], "missing");
        assert!(
            missing.message.contains(path.to_str().unwrap()),
            "{missing}"
        );
        // A file that takes no ioctl.
        std::fs::write(&path, "").unwrap();
        let other = told(open(&device).unwrap_err());
        assert_eq!(other.metadata["why"], "version");
        assert!(other.message.contains("is no KVM"), "{other}");
        // A mode that gives the group nothing cannot be mended by joining it.
        let denied = |mode| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(&path, mode).unwrap();
            told(not_opened(&device, libc::EACCES))
        };
        let closed = denied(0o600);
        assert!(closed.message.ends_with("its mode is 0600"), "{closed}");
        assert!(
            closed.metadata["advice"].starts_with("let the group"),
            "{closed}"
        );
        let open_to_group = denied(0o660);
        assert!(
            open_to_group.metadata["advice"].starts_with("add the agent's user"),
            "{open_to_group}"
        );
        if rustix::process::geteuid().is_root() {
            return;
        }
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o000))
            .unwrap();
        assert_eq!(told(open(&device).unwrap_err()).metadata["why"], "denied");
    }

    #[test]
    fn every_way_to_have_no_kvm_has_its_word_and_what_to_do() {
        let words = [
            (libc::ENOENT, "missing"),
            (libc::ENODEV, "no-driver"),
            (libc::ENXIO, "no-driver"),
            (libc::EACCES, "denied"),
            (libc::EPERM, "denied"),
        ];
        for (errno, word) in words {
            assert_eq!(told(not_opened(DEVICE, errno)).metadata["why"], word);
        }
        let busy = told(not_made(kvm_ioctls::Error::new(libc::EBUSY)));
        assert_eq!(busy.metadata["why"], "busy");
        // What has no words of its own keeps its number.
        let other = ApiError::from(not_made(kvm_ioctls::Error::new(libc::ENOMEM)));
        assert_eq!(other.reason, Reason::NoMemory);
        assert_eq!(other.metadata["errno"], libc::ENOMEM.to_string());
        let other = ApiError::from(not_opened(DEVICE, libc::EMFILE));
        assert_eq!(other.metadata["op"], "opening /dev/kvm");
    }

    #[test]
    fn an_interrupted_call_is_made_again_within_a_bound() {
        let mut left = 3;
        let done = uninterrupted(|| {
            left -= 1;
            let errno = if left % 2 == 0 {
                libc::EINTR
            } else {
                libc::EAGAIN
            };
            if left > 0 {
                return Err(kvm_ioctls::Error::new(errno));
            }
            Ok(7)
        });
        assert_eq!(done.unwrap(), 7);
        let mut calls = 0;
        let never = uninterrupted(|| -> Result<(), _> {
            calls += 1;
            Err(kvm_ioctls::Error::new(libc::EINTR))
        });
        assert_eq!(never.unwrap_err().errno(), libc::EINTR);
        assert_eq!(calls, INTERRUPTIONS);
        let mut calls = 0;
        let failed = uninterrupted(|| -> Result<(), _> {
            calls += 1;
            Err(kvm_ioctls::Error::new(libc::ENOMEM))
        });
        assert_eq!((failed.unwrap_err().errno(), calls), (libc::ENOMEM, 1));
    }
}
