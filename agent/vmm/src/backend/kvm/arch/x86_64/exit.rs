//! Exits of x86-64: a guest asks by ports.

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    backend::kvm::exit::{Contract, GuestExit},
    guest::arch::x86_64::{PORT_CONSOLE, PORT_DOORBELL, PORT_END},
};

/// Enters the guest, and says why it left.
pub(in crate::backend::kvm) fn run(
    vcpu: &mut VcpuFd,
    contract: Contract,
) -> Result<GuestExit<'_>, kvm_ioctls::Error> {
    vcpu.run().map(|exit| decode(exit, contract))
}

fn decode(exit: VcpuExit<'_>, contract: Contract) -> GuestExit<'_> {
    GuestExit::Refused(match (exit, contract) {
        (VcpuExit::IoIn(PORT_DOORBELL, data), Contract::Memstress) => {
            return GuestExit::Doorbell(data);
        }
        (VcpuExit::IoOut(PORT_CONSOLE, data), Contract::Raw) => return GuestExit::Print(data),
        (VcpuExit::IoOut(PORT_END, _), Contract::Raw) => return GuestExit::End,
        (VcpuExit::IoOut(port, data), _) => {
            let bytes = data.len();
            format!("write of {bytes} bytes to port {port:#x}, which does nothing here,")
        }
        (VcpuExit::IoIn(port, data), _) => {
            data.fill(0xff);
            format!("read from port {port:#x}, which does nothing here,")
        }
        (VcpuExit::Shutdown, _) => {
            "triple fault (an exception that the guest does not handle)".to_owned()
        }
        (VcpuExit::Hlt, _) => "halt without a source of interrupts".to_owned(),
        (exit, _) => return GuestExit::common(exit),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_contract_has_its_own_ports_and_no_others() {
        let mut answer = [0];
        let bell = VcpuExit::IoIn(PORT_DOORBELL, &mut answer);
        assert!(matches!(
            decode(bell, Contract::Memstress),
            GuestExit::Doorbell([0])
        ));
        let bell = VcpuExit::IoIn(PORT_DOORBELL, &mut answer);
        assert!(matches!(decode(bell, Contract::Raw), GuestExit::Refused(_)));
        assert_eq!(answer, [0xff], "nothing answers there");
        let print = VcpuExit::IoOut(PORT_CONSOLE, b"x");
        assert!(matches!(
            decode(print, Contract::Raw),
            GuestExit::Print(b"x")
        ));
        let end = VcpuExit::IoOut(PORT_END, &[]);
        assert!(matches!(decode(end, Contract::Raw), GuestExit::End));
        for port in [PORT_CONSOLE, PORT_END] {
            let exit = decode(VcpuExit::IoOut(port, &[]), Contract::Memstress);
            let GuestExit::Refused(words) = exit else {
                panic!("{exit:?}");
            };
            assert!(words.contains(&format!("port {port:#x}")), "{words}");
        }
    }

    #[test]
    fn exits_of_every_architecture_are_decoded_too() {
        assert!(matches!(
            decode(VcpuExit::Intr, Contract::Raw),
            GuestExit::Again
        ));
        let mut data = [0; 4];
        let read = decode(VcpuExit::MmioRead(0x5000, &mut data), Contract::Raw);
        assert!(matches!(read, GuestExit::Refused(words) if words.contains("0x5000")));
        assert_eq!(data, [0xff; 4]);
    }
}
