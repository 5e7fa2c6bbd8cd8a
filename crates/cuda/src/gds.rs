//! GPUDirect Storage: reads that a drive writes to the GPU's memory by itself, past the host's,
//! through NVIDIA's libcufile, which is loaded while the program runs.
//!
//! That the library opens proves nothing: where it cannot do such reads, it would read through host
//! memory of its own and not say so (its "compatibility mode"). That is switched off here, so that a
//! read that succeeds was one. (NVIDIA, "cuFile API Reference Guide".)

use std::env;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

use libloading::Library;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::{Block, Span};
use crate::sync::lock;

/// What offsets of reads are multiples of, so that every drive and filesystem takes them.
const BLOCK: u64 = 4096;

/// What buffers begin at multiples of: a GPU's page, as it is mapped for others.
const GPU_PAGE: u64 = 64 << 10;

/// Names a libcufile, in place of those that the system is asked for.
const LIBRARY_VARIABLE: &str = "TIERSTREAM_CUFILE";
/// The library's own switch of its compatibility mode.
const COMPAT_VARIABLE: &str = "CUFILE_ALLOW_COMPAT_MODE";
/// The library's own: where it writes what went wrong.
const LOG_VARIABLE: &str = "CUFILE_LOGFILE_PATH";

/// Where libcufile, and the kernel's part in such reads, are looked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// Libraries, by name or path: the first that can be loaded is taken.
    pub libraries: Vec<PathBuf>,
    /// The device of the kernel module nvidia-fs.
    pub nvidia_fs: PathBuf,
    /// The kernel's symbols: a driver that lets drives write to the GPU's memory without that module
    /// has one for it.
    pub kernel_symbols: PathBuf,
    /// The user has switched the compatibility mode off, for libraries that only listen to that.
    pub compat_off: bool,
}

impl Places {
    /// Those of this system. `TIERSTREAM_CUFILE` may name the library.
    pub fn here() -> Self {
        let libraries = match env::var_os(LIBRARY_VARIABLE) {
            Some(named) => vec![named.into()],
            None => vec!["libcufile.so.0".into(), "libcufile.so".into()],
        };
        Self {
            libraries,
            nvidia_fs: "/dev/nvidia-fs0".into(),
            kernel_symbols: "/proc/kallsyms".into(),
            compat_off: env::var_os(COMPAT_VARIABLE)
                .is_some_and(|value| value.eq_ignore_ascii_case("false")),
        }
    }

    fn support(&self) -> Result<Support> {
        if self.nvidia_fs.exists() {
            return Ok(Support::NvidiaFs);
        }
        if has_symbol(&self.kernel_symbols, "p2pdma_pgmap_ops") {
            return Ok(Support::P2pDma);
        }
        Err(no_gds(format!(
            "there is neither the kernel module nvidia-fs ({}) nor a kernel that can do without \
             (no p2pdma_pgmap_ops in {})",
            self.nvidia_fs.display(),
            self.kernel_symbols.display()
        )))
    }
}

/// Whether the kernel has a symbol of this name.
fn has_symbol(symbols: &Path, name: &str) -> bool {
    let Ok(symbols) = fs::File::open(symbols) else { return false };
    let lines = BufReader::with_capacity(1 << 16, symbols).split(b'\n').map_while(io::Result::ok);
    let mut names = lines.map(|line| {
        let word = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).nth(2);
        word.is_some_and(|word| word == name.as_bytes())
    });
    names.any(|is_it| is_it)
}

/// What of the kernel takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Support {
    NvidiaFs,
    P2pDma,
}

/// A libcufile that is there, and a kernel that may support it. Nothing is started yet.
#[derive(Debug, Clone)]
pub struct Cufile {
    api: Api,
    library: PathBuf,
    support: Support,
    compat_off: bool,
}

/// The library, and what of the kernel supports it.
impl fmt::Display for Cufile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let with = match self.support {
            Support::NvidiaFs => "with nvidia-fs",
            Support::P2pDma => "without nvidia-fs",
        };
        write!(f, "{} {with}", self.library.display())
    }
}

impl Cufile {
    /// Looks for the library, then for the kernel's part.
    ///
    /// # Errors
    /// [`Error::NoGds`] with the reason.
    pub fn find(places: &Places) -> Result<Self> {
        let mut tried = Vec::new();
        for name in &places.libraries {
            // SAFETY: the library is what the user has installed, or named, as NVIDIA's.
            match unsafe { Library::new(name) } {
                Ok(library) => {
                    // It may have threads by now: never unloaded.
                    let api = Api::of(Box::leak(Box::new(library)), name)?;
                    let (library, support) = (name.clone(), places.support()?);
                    return Ok(Self { api, library, support, compat_off: places.compat_off });
                }
                Err(error) => tried.push(loader_text(error)),
            }
        }
        Err(no_gds(format!("libcufile cannot be loaded ({})", tried.join("; "))))
    }

    /// Starts it, for reads to `device`, with its compatibility mode off.
    ///
    /// # Errors
    /// [`Error::NoGds`] with the reason; what the driver says.
    pub fn open(self, device: &Device) -> Result<Gds> {
        let api = self.api;
        current(device, "start libcufile", || {
            let mut users = lock(&USERS);
            let count = match users.iter_mut().find(|(of, _)| *of == api.id()) {
                Some((_, count)) => count,
                None => {
                    users.push((api.id(), 0));
                    &mut users.last_mut().expect("just pushed").1
                }
            };
            if *count == 0 {
                self.switch_compat_off()?;
                // SAFETY: as documented; balanced by `Opened`'s drop.
                api.check(unsafe { (api.driver_open)() }, "libcufile does not start")?;
            }
            *count += 1;
            Ok(())
        })??;
        Ok(Gds { opened: Arc::new(Opened { api, device: device.clone() }) })
    }

    /// Before the library starts: later, it would not listen.
    fn switch_compat_off(&self) -> Result<()> {
        let Some(set) = self.api.set_bool else {
            let library = self.library.display();
            return if self.support == Support::P2pDma {
                Err(no_gds(format!(
                    "{library} is too old to do without the kernel module nvidia-fs: CUDA 12.9's \
                     is the first that can be told to"
                )))
            } else if self.compat_off {
                Ok(())
            } else {
                Err(no_gds(format!(
                    "{library} is too old to be told that its compatibility mode is not wanted: \
                     set {COMPAT_VARIABLE}=false for it"
                )))
            };
        };
        // SAFETY: as documented: a parameter's number, and its value.
        let set = |parameter, value| unsafe { set(parameter, value) };
        let off = set(ALLOW_COMPAT_MODE, false);
        self.api.check(off, "libcufile keeps its compatibility mode")?;
        if let (Some(set), None) = (self.api.set_string, env::var_os(LOG_VARIABLE)) {
            // It would leave a cufile.log in the current folder whenever something is refused.
            let folder = CString::new(env::temp_dir().into_os_string().into_encoded_bytes());
            // SAFETY: as documented: a parameter's number, and a string that outlives the call.
            let _ = folder.map(|folder| unsafe { set(LOG_DIR, folder.as_ptr()) });
        }
        for parameter in OTHER_WAYS_AROUND {
            // Libraries that do not know one refuse it.
            let _ = set(parameter, false);
        }
        if self.support == Support::P2pDma {
            let on = set(USE_PCIP2PDMA, true);
            self.api.check(on, "libcufile cannot do without the kernel module nvidia-fs")?;
        }
        Ok(())
    }
}

/// libcufile, started for one device. Clones are the same; it ends with the last one, and what was made
/// of it.
#[derive(Clone)]
pub struct Gds {
    opened: Arc<Opened>,
}

impl Gds {
    /// Lets a file be read. It has to be open for direct I/O, unless the library can do without.
    ///
    /// # Errors
    /// [`Error::NoGds`]: the library does not take it, for its filesystem or drive for example.
    pub fn register(&self, file: fs::File) -> Result<GdsFile> {
        let Opened { api, device } = &*self.opened;
        let mut handle = Handle(null_mut());
        let mut description =
            Description { kind: OPAQUE_FD, file: FileOf { fd: file.as_raw_fd() }, fs_ops: null() };
        current(device, "register a file", || {
            // SAFETY: reads and writes locals; the file stays open as long as it is registered.
            let status = unsafe { (api.handle_register)(&mut handle, &mut description) };
            api.check(status, "libcufile does not take the file")
        })??;
        Ok(GdsFile { handle, opened: self.opened.clone(), _file: file })
    }

    /// Memory of the device to read to, of unknown contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Config`] for no bytes; [`Error::NoGds`] if drives cannot be let
    /// at so much of it.
    pub fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let Opened { api, device } = &*self.opened;
        if bytes == 0 {
            return Err(Error::Config("no bytes to read to".to_owned()));
        }
        let block = device.allocate(bytes as u64 + GPU_PAGE)?;
        let before = block.address().next_multiple_of(GPU_PAGE) - block.address();
        let base = Base(block.address() + before);
        current(device, "register a buffer", || {
            // SAFETY: memory of the device, which lives as long as it is registered.
            let status = unsafe { (api.buf_register)(base.pointer(), bytes, 0) };
            api.check(status, "libcufile does not take a buffer of the GPU")
        })??;
        Ok(Buffer { base, bytes, before, opened: self.opened.clone(), block })
    }
}

impl fmt::Debug for Gds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gds").field(&self.opened.device).finish()
    }
}

/// A file that the library reads.
pub struct GdsFile {
    handle: Handle,
    opened: Arc<Opened>,
    /// Open as long as it is registered.
    _file: fs::File,
}

// SAFETY: a handle of the library's, which every thread may use at the same time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl GdsFile {
    /// Reads `bytes` from `offset` on, a multiple of 4096, to the start of `to`. Returns how many there
    /// were: fewer only at the end of the file. Waits for the drive; several threads may read at once,
    /// each to a buffer of its own. What copied from the buffer has to be done.
    ///
    /// # Errors
    /// What the system or the library says; with an [`Error`] of this crate inside, what the driver does.
    pub fn read(&self, offset: u64, bytes: usize, to: &Buffer) -> io::Result<usize> {
        let Opened { api, device } = &*self.opened;
        let is_ours = Arc::ptr_eq(&self.opened, &to.opened);
        let end = offset.checked_add(bytes as u64).and_then(|end| i64::try_from(end).ok());
        if !is_ours || bytes > to.bytes || end.is_none() || !offset.is_multiple_of(BLOCK) {
            let what = format!("{bytes} bytes at {offset} are not for a buffer of {}", to.bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut done = 0;
        loop {
            let (at, left) = (offset + done as u64, bytes - done);
            let read = current(device, "read", || {
                // SAFETY: a registered file, and a part of a registered buffer, both of which outlive
                // the call; the numbers fit, see above.
                let read = unsafe {
                    (api.read)(self.handle, to.base.pointer(), left, at as i64, done as i64)
                };
                match usize::try_from(read) {
                    Ok(read) => Ok(read),
                    // Before anything else is called.
                    Err(_) if read == -1 => Err(io::Error::last_os_error()),
                    Err(_) => Err(io::Error::other(code_text(read.unsigned_abs()))),
                }
            });
            match read.map_err(io::Error::other)? {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(read) if read >= left => return Ok(bytes),
                Ok(read) => {
                    // On from a whole block; without one, this was the end of the file.
                    let there = done + read;
                    let next = there - there % BLOCK as usize;
                    if next == done {
                        return Ok(there);
                    }
                    done = next;
                }
            }
        }
    }
}

impl Drop for GdsFile {
    fn drop(&mut self) {
        let Opened { api, device } = &*self.opened;
        // SAFETY: registered by `register`, once; no read is under way, for they borrow it.
        let _ = current(device, "", || unsafe { (api.handle_deregister)(self.handle) });
    }
}

impl fmt::Debug for GdsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GdsFile").field(&self.handle).finish()
    }
}

/// Memory of the device that drives may write to.
pub struct Buffer {
    base: Base,
    bytes: usize,
    /// Bytes of the block before it.
    before: u64,
    opened: Arc<Opened>,
    block: Block,
}

impl Buffer {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`Error::Range`] beyond its end.
    pub fn span(&self, offset: u64, bytes: u64) -> Result<Span> {
        crate::memory::check_range(offset, bytes, self.bytes as u64)?;
        self.block.span(self.before + offset, bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Opened { api, device } = &*self.opened;
        // SAFETY: registered by `buffer`, once; no read is under way, for they borrow it.
        let _ = current(device, "", || unsafe { (api.buf_deregister)(self.base.pointer()) });
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes at {:#x})", self.bytes, self.base.0)
    }
}

/// An address of the device.
#[derive(Clone, Copy)]
struct Base(u64);

impl Base {
    fn pointer(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
}

/// How often each library is open. It is started once for all, and ended with the last.
static USERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

struct Opened {
    api: Api,
    device: Device,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let api = self.api;
        let mut users = lock(&USERS);
        let Some((_, count)) = users.iter_mut().find(|(of, _)| *of == api.id()) else { return };
        *count -= 1;
        if *count == 0 {
            // SAFETY: what was registered holds this, so all of it is gone.
            let _ = current(&self.device, "", || unsafe { (api.driver_close)() });
        }
    }
}

/// Calls with `device` as this thread's current one.
fn current<T>(device: &Device, doing: &str, call: impl FnOnce() -> T) -> Result<T> {
    let (mut call, mut result) = (Some(call), None);
    let called = device.driver().as_current(&mut || result = call.take().map(|call| call()));
    called.map_err(|failure| failure.doing(doing))?;
    Ok(result.expect("called if nothing failed"))
}

/// What the system's loader says.
fn loader_text(error: libloading::Error) -> String {
    let source = std::error::Error::source(&error).map(ToString::to_string);
    source.unwrap_or_else(|| error.to_string())
}

fn no_gds(reason: String) -> Error {
    Error::NoGds { reason }
}

/// `CUfileHandle_t`
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
struct Handle(*mut c_void);

/// `CUfileError_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct Status {
    code: c_int,
    /// Of CUDA, if `code` says that it is its.
    cuda: c_int,
}

/// `CUfileDescr_t`
#[repr(C)]
struct Description {
    kind: c_int,
    file: FileOf,
    /// For filesystems in user space.
    fs_ops: *const c_void,
}

#[repr(C)]
union FileOf {
    fd: c_int,
    _handle: *mut c_void,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`
const OPAQUE_FD: c_int = 1;

// `CUFileBoolConfigParameter_t`: CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE, CUFILE_PARAM_USE_PCIP2PDMA;
// CUFILE_PARAM_FORCE_COMPAT_MODE and, since CUDA 13, CUFILE_PARAM_PROPERTIES_POSIX_IO_MODE and
// CUFILE_PARAM_GDS_FALLBACK_IO.
const ALLOW_COMPAT_MODE: c_int = 1;
const USE_PCIP2PDMA: c_int = 7;
const OTHER_WAYS_AROUND: [c_int; 3] = [2, 12, 13];
/// `CUFILE_PARAM_LOG_DIR`, of `CUFileStringConfigParameter_t`
const LOG_DIR: c_int = 2;

/// The functions of the library that are called here, and live as long as the program.
#[derive(Debug, Clone, Copy)]
struct Api {
    driver_open: unsafe extern "C" fn() -> Status,
    driver_close: unsafe extern "C" fn() -> Status,
    handle_register: unsafe extern "C" fn(*mut Handle, *mut Description) -> Status,
    handle_deregister: unsafe extern "C" fn(Handle),
    buf_register: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    buf_deregister: unsafe extern "C" fn(*const c_void) -> Status,
    read: unsafe extern "C" fn(Handle, *mut c_void, usize, i64, i64) -> isize,
    /// Since CUDA 12.9.
    set_bool: Option<unsafe extern "C" fn(c_int, bool) -> Status>,
    set_string: Option<unsafe extern "C" fn(c_int, *const c_char) -> Status>,
}

impl Api {
    fn of(library: &'static Library, path: &Path) -> Result<Self> {
        let lacks = |error| no_gds(format!("{}: {}", path.display(), loader_text(error)));
        // SAFETY: the types are those that the library's documentation gives these names.
        unsafe {
            Ok(Self {
                driver_open: *library.get("cuFileDriverOpen").map_err(lacks)?,
                driver_close: *library
                    .get("cuFileDriverClose_v2")
                    .or_else(|_| library.get("cuFileDriverClose"))
                    .map_err(lacks)?,
                handle_register: *library.get("cuFileHandleRegister").map_err(lacks)?,
                handle_deregister: *library.get("cuFileHandleDeregister").map_err(lacks)?,
                buf_register: *library.get("cuFileBufRegister").map_err(lacks)?,
                buf_deregister: *library.get("cuFileBufDeregister").map_err(lacks)?,
                read: *library.get("cuFileRead").map_err(lacks)?,
                set_bool: library.get("cuFileSetParameterBool").ok().map(|set| *set),
                set_string: library.get("cuFileSetParameterString").ok().map(|set| *set),
            })
        }
    }

    /// The same number for the same library.
    fn id(&self) -> usize {
        self.read as usize
    }

    fn check(&self, status: Status, what: &str) -> Result<()> {
        if status.code == 0 {
            return Ok(());
        }
        let mut text = code_text(status.code.unsigned_abs() as usize);
        if status.code.unsigned_abs() as usize == CUDA_DRIVER_ERROR {
            text = format!("{text}, CUDA error {}", status.cuda);
        }
        Err(no_gds(format!("{what}: {text}")))
    }
}

const CUDA_DRIVER_ERROR: usize = 5011;

/// An error in words: of the library (`CUfileOpError`), or an `errno`.
fn code_text(code: usize) -> String {
    let name = match code {
        5001 => "DRIVER_NOT_INITIALIZED",
        5004 => "DRIVER_VERSION_MISMATCH",
        5005 => "DRIVER_VERSION_READ_ERROR",
        5007 => "PLATFORM_NOT_SUPPORTED",
        5008 => "IO_NOT_SUPPORTED",
        5009 => "DEVICE_NOT_SUPPORTED",
        5010 => "NVFS_DRIVER_ERROR",
        CUDA_DRIVER_ERROR => "CUDA_DRIVER_ERROR",
        5012 => "CUDA_POINTER_INVALID",
        5013 => "CUDA_MEMORY_TYPE_INVALID",
        5016 => "INVALID_MAPPING_SIZE",
        5018 => "INVALID_FILE_TYPE",
        5019 => "INVALID_FILE_OPEN_FLAG",
        5020 => "DIO_NOT_SET",
        5022 => "INVALID_VALUE",
        5025 => "PERMISSION_DENIED",
        5026 => "DRIVER_ALREADY_OPEN",
        5029 => "DEVICE_NOT_FOUND",
        5030 => "INTERNAL_ERROR",
        5033 => "NVFS_SETUP_ERROR",
        5034 => "IO_DISABLED",
        5036 => "GPU_MEMORY_PINNING_FAILED",
        code if code < 5000 => return io::Error::from_raw_os_error(code as i32).to_string(),
        code => return format!("cuFile error {code}"),
    };
    format!("cuFile error {code}, CU_FILE_{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_is_a_whole_word() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let has = |text: &str| {
            fs::write(file.path(), text).unwrap();
            has_symbol(file.path(), "p2pdma_pgmap_ops")
        };
        assert!(has("0000000000000000 T a\n0000000000000000 r p2pdma_pgmap_ops\n"));
        assert!(has("0 r p2pdma_pgmap_ops\t[module]"));
        assert!(!has("0 r p2pdma_pgmap_ops_more\n0 r xp2pdma_pgmap_ops\n"));
        assert!(!has(""));
        assert!(!has_symbol(Path::new("/no/such/file"), "p2pdma_pgmap_ops"));
    }

    #[test]
    fn codes_are_told_in_words() {
        assert_eq!(code_text(5008), "cuFile error 5008, CU_FILE_IO_NOT_SUPPORTED");
        assert_eq!(code_text(5999), "cuFile error 5999");
        assert_eq!(code_text(22), "Invalid argument (os error 22)");
    }
}
