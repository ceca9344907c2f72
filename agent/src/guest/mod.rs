//! Guests: memstress and the raw image.
