//! Where an image's bytes are: a port, so that a test can let a write or a sync fail, and so that a
//! file which somebody else opened does.
//!
//! Positions are given with each call, and calls come from several threads at once. Calls may do
//! less than they were asked for; [`write_all`] and [`read_exact`] go on then.

use std::{fs::File, io, sync::Arc};

/// Bytes with positions. All calls may block.
pub trait Storage: Send + Sync {
    /// Writes some of `bytes` at `offset`, and says how many.
    ///
    /// # Errors
    /// When nothing could be written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Reads some bytes from `offset` on, and says how many; 0 at the end.
    ///
    /// # Errors
    /// When nothing could be read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Returns once all that was written is durable.
    ///
    /// # Errors
    /// When it may not be. Trying again proves nothing.
    fn sync(&self) -> io::Result<()>;

    /// How many bytes there are.
    ///
    /// # Errors
    /// When the kernel does not say.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are none.
    ///
    /// # Errors
    /// As [`Storage::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

impl Storage for File {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(self, bytes, offset)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl<S: Storage + ?Sized> Storage for &S {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        (**self).write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        (**self).write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
}

/// Writes all of `bytes`.
pub(crate) fn write_all(
    storage: &impl Storage,
    mut offset: u64,
    mut bytes: &[u8],
) -> io::Result<()> {
    while !bytes.is_empty() {
        match storage.write_at(offset, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            // A storage that says more than it was given is not believed.
            Ok(some) => {
                bytes = bytes.get(some..).ok_or(io::ErrorKind::InvalidData)?;
                offset += some as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `buffer`. `UnexpectedEof` when the end comes first.
pub(crate) fn read_exact(
    storage: &impl Storage,
    mut offset: u64,
    mut buffer: &mut [u8],
) -> io::Result<()> {
    while !buffer.is_empty() {
        match storage.read_at(offset, buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(some) => {
                buffer = buffer.get_mut(some..).ok_or(io::ErrorKind::InvalidData)?;
                offset += some as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
