//! systemd's readiness protocol (`Type=notify`): one datagram to the socket named by NOTIFY_SOCKET.
//! Without it, nothing.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// Tells the service manager, e.g. `READY=1` or `STOPPING=1`. A failure is logged: the daemon works
/// without its manager.
pub(crate) fn notify(state: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&socket, state)
    {
        tracing::warn!(%error, ?socket, "the service manager was not told");
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let bytes = socket.as_bytes();
    let address = match bytes.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_hears_the_state_at_a_path_and_at_an_abstract_name() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("notify");
        let name = format!("slat-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path).unwrap();
        let at_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, place) in [
            (at_path, path.into_os_string()),
            (at_name, format!("@{name}").into()),
        ] {
            send(&place, "READY=1").unwrap();
            let mut buffer = [0; 16];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
    }

    #[test]
    fn a_missing_manager_is_an_error_not_a_panic() {
        assert!(send(OsStr::new("/nonexistent/notify"), "READY=1").is_err());
    }
}
