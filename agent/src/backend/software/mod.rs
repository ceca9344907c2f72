//! The Common MMU as the page table (not built yet).
