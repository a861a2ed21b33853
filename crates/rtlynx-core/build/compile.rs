//! Compiles every `cuda/kernels/*.cu` to one fatbin, several files at a time.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::nvcc::Nvcc;

/// A device code target: its name for people and its `-gencode` argument.
pub type Target = (&'static str, &'static str);

/// Machine code for Ampere and Ada, PTX that the driver compiles for chips without machine code here, machine code for Hopper.
const EVERYWHERE: [Target; 3] = [
    ("sm_80", "arch=compute_80,code=sm_80"),
    ("compute_80", "arch=compute_80,code=compute_80"),
    ("sm_90a", "arch=compute_90a,code=sm_90a"),
];

/// For `*_sm90.cu`: instructions that exist on Hopper only.
const HOPPER_ONLY: [Target; 1] = [EVERYWHERE[2]];

/// One compiled source file.
pub struct Fatbin {
    /// File stem of the source, e.g. `spmm_sm80`.
    pub stem: String,
    /// The fatbin in `OUT_DIR`.
    pub path: PathBuf,
    /// Names of the targets inside.
    pub targets: Vec<&'static str>,
    /// Names of its kernels, as ptxas reports them.
    pub kernels: BTreeSet<String>,
}

/// The `.cu` files of a folder, sorted, so that builds are reproducible.
pub fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(kernels).map_err(|e| format!("cannot list {}: {e}", kernels.display()))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    files.sort();
    Ok(files)
}

/// Compiles all sources, one thread per core; the first failure, in file order, is the error.
///
/// `strict` turns compiler warnings, register spills and stack frames into errors.
pub fn compile_all(nvcc: &Nvcc, sources: &[PathBuf], include: &Path, out: &Path, strict: bool) -> Result<Vec<Fatbin>, String> {
    let next = AtomicUsize::new(0);
    let workers = thread::available_parallelism().map_or(2, usize::from).min(sources.len());
    let mut done: Vec<(usize, Result<Fatbin, String>)> = thread::scope(|scope| {
        let work = || {
            let mine = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < sources.len()));
            mine.map(|i| (i, compile(nvcc, &sources[i], include, out, strict))).collect::<Vec<_>>()
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("a compile thread panicked")).collect()
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

fn compile(nvcc: &Nvcc, source: &Path, include: &Path, out: &Path, strict: bool) -> Result<Fatbin, String> {
    let stem = source.file_stem().expect("a .cu file has a stem").to_string_lossy().into_owned();
    let targets: &[Target] = if stem.ends_with("_sm90") { &HOPPER_ONLY } else { &EVERYWHERE };
    let path = out.join(format!("{stem}.fatbin"));

    let mut command = Command::new(&nvcc.path);
    command.args(["-fatbin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v"]);
    for (_, gencode) in targets {
        command.args(["-gencode", gencode]);
    }
    if strict {
        command.args(["-Werror", "all-warnings", "-Xptxas", "-Werror,--warn-on-spills,--warn-on-local-memory-usage"]);
    }
    command.arg("-I").arg(include).arg("-o").arg(&path).arg(source);

    let output = command.output().map_err(|e| format!("cannot run {}: {e}", nvcc.path.display()))?;
    // Resource usage and diagnostics come on either stream, depending on the nvcc release.
    let log = [output.stdout, output.stderr].concat();
    let log = String::from_utf8_lossy(&log);
    if !output.status.success() {
        let hint = if log.contains("host compiler") || log.contains("g++") || log.contains("gcc: ") {
            "\nnvcc preprocesses with a host C++ compiler: install g++ (Debian, Ubuntu: `apt install g++`)."
        } else {
            ""
        };
        return Err(format!("nvcc failed on {} ({}):\n{}{hint}", source.display(), output.status, without_resource_usage(&log)));
    }
    if strict {
        refuse_spills(&log).map_err(|usage| {
            format!("{}: spills registers, uses the stack or serialises wgmma, refused by RTLYNX_STRICT=1:\n{usage}", source.display())
        })?;
    }
    let targets = targets.iter().map(|(name, _)| *name).collect();
    Ok(Fatbin { stem, path, targets, kernels: entry_functions(&log) })
}

/// The names in ptxas's "Compiling entry function 'NAME' for 'sm_80'".
fn entry_functions(log: &str) -> BTreeSet<String> {
    log.lines().filter_map(|line| Some(line.split_once("Compiling entry function '")?.1.split_once('\'')?.0.to_owned())).collect()
}

/// Looks for a non-zero figure in ptxas's "N bytes stack frame, N bytes spill stores, N bytes spill loads" lines, and for what ptxas calls a
/// potential performance loss: that it makes every wgmma of a kernel wait for the one before.
fn refuse_spills(log: &str) -> Result<(), String> {
    let mut function = "";
    let mut found = Vec::new();
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim();
        } else if line.contains("bytes stack frame") && line.split(',').any(|part| !part.trim().starts_with("0 bytes")) {
            found.push(format!("  {function}: {}", line.trim()));
        } else if line.contains("Potential Performance Loss") {
            found.push(format!("  {}", line.trim()));
        }
    }
    if found.is_empty() { Ok(()) } else { Err(found.join("\n")) }
}

/// Drops ptxas's pages of "info" lines, so that an error stands alone.
fn without_resource_usage(log: &str) -> String {
    log.lines().filter(|line| !line.starts_with("ptxas info") && !line.contains("bytes stack frame")).collect::<Vec<_>>().join("\n")
}
