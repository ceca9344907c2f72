//! KVM (not built yet).
