//! Numbers of the registers of `KVM_GET_ONE_REG`: the kernel's structures give their order.

use std::mem::offset_of;

use kvm_bindings::{
    KVM_REG_RISCV, KVM_REG_RISCV_CONFIG, KVM_REG_RISCV_CORE, KVM_REG_RISCV_CSR,
    KVM_REG_RISCV_ISA_EXT, KVM_REG_RISCV_TIMER, KVM_REG_SIZE_U64, kvm_riscv_config, kvm_riscv_csr,
    kvm_riscv_timer,
};

const WORD: usize = size_of::<u64>();

/// A register of 64 bits: its kind and its place among them.
const fn id(kind: u32, place: usize) -> u64 {
    KVM_REG_RISCV as u64 | KVM_REG_SIZE_U64 | kind as u64 | place as u64
}

pub(super) const SATP_MODE: u64 = id(
    KVM_REG_RISCV_CONFIG,
    offset_of!(kvm_riscv_config, satp_mode) / WORD,
);
pub(super) const ZICBOM_BYTES: u64 = id(
    KVM_REG_RISCV_CONFIG,
    offset_of!(kvm_riscv_config, zicbom_block_size) / WORD,
);
pub(super) const ZICBOZ_BYTES: u64 = id(
    KVM_REG_RISCV_CONFIG,
    offset_of!(kvm_riscv_config, zicboz_block_size) / WORD,
);
pub(super) const TIMER_FREQUENCY: u64 = id(
    KVM_REG_RISCV_TIMER,
    offset_of!(kvm_riscv_timer, frequency) / WORD,
);
pub(super) const SATP: u64 = id(KVM_REG_RISCV_CSR, offset_of!(kvm_riscv_csr, satp) / WORD);
pub(super) const SENVCFG: u64 = id(KVM_REG_RISCV_CSR, offset_of!(kvm_riscv_csr, senvcfg) / WORD);
/// The first of the core registers.
pub(super) const PC: u64 = id(KVM_REG_RISCV_CORE, 0);

/// Whether vCPUs have the extension of that number: 0 or 1.
pub(super) const fn extension(number: usize) -> u64 {
    id(KVM_REG_RISCV_ISA_EXT, number)
}

/// Names of the extensions, by the kernel's number.
pub(super) const EXTENSIONS: [&str; 71] = [
    "a",
    "c",
    "d",
    "f",
    "h",
    "i",
    "m",
    "svpbmt",
    "sstc",
    "svinval",
    "zihintpause",
    "zicbom",
    "zicboz",
    "zbb",
    "ssaia",
    "v",
    "svnapot",
    "zba",
    "zbs",
    "zicntr",
    "zicsr",
    "zifencei",
    "zihpm",
    "smstateen",
    "zicond",
    "zbc",
    "zbkb",
    "zbkc",
    "zbkx",
    "zknd",
    "zkne",
    "zknh",
    "zkr",
    "zksed",
    "zksh",
    "zkt",
    "zvbb",
    "zvbc",
    "zvkb",
    "zvkg",
    "zvkned",
    "zvknha",
    "zvknhb",
    "zvksed",
    "zvksh",
    "zvkt",
    "zfh",
    "zfhmin",
    "zihintntl",
    "zvfh",
    "zvfhmin",
    "zfa",
    "ztso",
    "zacas",
    "sscofpmf",
    "zimop",
    "zca",
    "zcb",
    "zcd",
    "zcf",
    "zcmop",
    "zawrs",
    "smnpm",
    "ssnpm",
    "svade",
    "svadu",
    "svvptc",
    "zabha",
    "ziccrse",
    "zaamo",
    "zalrsc",
];

// A newer binding that knows more extensions must not build without their names.
const _: () =
    assert!(EXTENSIONS.len() == kvm_bindings::KVM_RISCV_ISA_EXT_ID_KVM_RISCV_ISA_EXT_MAX as usize);
