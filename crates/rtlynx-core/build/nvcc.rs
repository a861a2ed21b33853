//! Finds nvcc, and says where it looked when there is none.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Environment variables that decide which nvcc is found; cargo re-runs the build script when one changes.
pub const ENVIRONMENT: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PYO3_PYTHON"];

/// The oldest release that compiles the kernels: major and minor.
const OLDEST: (u32, u32) = (12, 5);

/// Prints every place where a pip-installed nvcc of CUDA 13 could lie, one per line.
const PYTHON_PLACES: &str = "import os, sys
for p in dict.fromkeys(sys.path):
    print(os.path.join(os.path.abspath(p or '.'), 'nvidia', 'cu13', 'bin', 'nvcc'))";

/// An nvcc that runs and is new enough.
#[derive(Clone, Debug)]
pub struct Nvcc {
    /// The compiler driver.
    pub path: PathBuf,
    /// Its release, e.g. `13.0.88`.
    pub version: String,
}

/// No nvcc: the places tried, in order, each with what was wrong there.
#[derive(Debug, Default)]
pub struct NotFound {
    tried: Vec<String>,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rtlynx needs nvcc to compile its kernels and found none. Places tried, in order:")?;
        for place in &self.tried {
            writeln!(f, "  - {place}")?;
        }
        let (major, minor) = OLDEST;
        write!(
            f,
            "To fix it, either
  - build with pip (`pip install .`): it fetches nvcc from PyPI on its own, or
  - pip install \"nvidia-cuda-nvcc==13.0.*\" \"nvidia-cuda-crt==13.0.*\" \"nvidia-nvvm==13.0.*\" \"nvidia-cuda-runtime==13.0.*\" \
\"nvidia-cuda-cccl==13.0.*\" into the Python that builds, or
  - install a CUDA toolkit, version {major}.{minor} or newer, and set CUDA_HOME (or NVCC to the compiler itself), or
  - set RTLYNX_NO_DEVICE_CODE=1 to build without GPU kernels: rtlynx then runs on the CPU only."
        )
    }
}

/// The first nvcc that runs and is new enough, of: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, the PyPI wheels of the Python that builds.
pub fn find() -> Result<Nvcc, NotFound> {
    let mut missing = NotFound::default();
    if let Some(path) = variable("NVCC") {
        // An explicit choice that does not work is an error, not a reason to take another compiler silently.
        return probe(Path::new(&path)).map_err(|why| NotFound { tried: vec![format!("NVCC={}: {why}", path.display())] });
    }
    missing.tried.push("NVCC: not set".to_owned());

    for name in ["CUDA_HOME", "CUDA_PATH"] {
        let Some(home) = variable(name) else {
            missing.tried.push(format!("{name}: not set"));
            continue;
        };
        let path = Path::new(&home).join("bin").join("nvcc");
        match probe(&path) {
            Ok(nvcc) => return Ok(nvcc),
            Err(why) => missing.tried.push(format!("{name}={}: bin/nvcc {why}", home.display())),
        }
    }

    let folders = variable("PATH").unwrap_or_default();
    let mut on_path = env::split_paths(&folders).map(|folder| folder.join("nvcc")).filter(|path| path.is_file()).peekable();
    if on_path.peek().is_none() {
        missing.tried.push("PATH: no nvcc in any of its folders".to_owned());
    }
    for path in on_path {
        match probe(&path) {
            Ok(nvcc) => return Ok(nvcc),
            Err(why) => missing.tried.push(format!("PATH: {} {why}", path.display())),
        }
    }

    for python in pythons() {
        match python_nvcc(&python) {
            Ok(nvcc) => return Ok(nvcc),
            Err(why) => missing.tried.push(format!("PyPI wheels of {}: {why}", python.display())),
        }
    }
    Err(missing)
}

/// A set, non-empty environment variable.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// The interpreter maturin builds for, then the usual names.
fn pythons() -> Vec<OsString> {
    variable("PYO3_PYTHON").into_iter().chain(["python3".into(), "python".into()]).collect()
}

/// The nvcc of the `nvidia-cuda-nvcc` wheel on this interpreter's `sys.path`. Under pip's build isolation that path reaches the
/// interpreter through environment variables, which this process inherits.
fn python_nvcc(python: &OsString) -> Result<Nvcc, String> {
    let output = Command::new(python).args(["-c", PYTHON_PLACES]).output().map_err(|e| format!("does not run ({e})"))?;
    if !output.status.success() {
        return Err(format!("does not run ({})", output.status));
    }
    let places = String::from_utf8_lossy(&output.stdout);
    match places.lines().map(Path::new).find(|path| path.is_file()) {
        Some(path) => probe(path).map_err(|why| format!("{} {why}", path.display())),
        None => Err("no nvidia/cu13/bin/nvcc on its sys.path".to_owned()),
    }
}

/// Runs `nvcc --version`, and refuses a release that is too old.
fn probe(path: &Path) -> Result<Nvcc, String> {
    let output = Command::new(path).arg("--version").output().map_err(|e| format!("does not run ({e})"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match version(&text) {
        Some((version, release)) if output.status.success() => match release {
            (major, minor) if release < OLDEST => Err(format!("is too old: {major}.{minor}")),
            _ => Ok(Nvcc { path: path.to_owned(), version }),
        },
        _ => Err(format!("does not answer --version as nvcc does ({})", output.status)),
    }
}

/// `13.0.88` and its major and minor numbers out of "Cuda compilation tools, release 13.0, V13.0.88".
fn version(text: &str) -> Option<(String, (u32, u32))> {
    let (_, rest) = text.split_once(", V")?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let mut numbers = rest[..end].split('.').map(str::parse);
    let release = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((rest[..end].to_owned(), release))
}
