//! The flags of `tierstream bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use tierstream::io::EngineKind;
use tierstream::size::{Bytes, PoolShare};

use super::{LoadArgs, MachineArgs, ModelArgs, io_engine, whole};

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Tokens per second with pools of several sizes, against stock llama.cpp if asked for
    Decode(BenchDecode),
    /// Tokens per second of prompts, and the share of the bus to the GPU that is used
    Prefill(BenchPrefill),
    /// How fast weights come from the drive, beside plain reads of the same bytes and other loaders
    ///
    /// From a process that is ready to all weights in memory. A model is a GGUF, or a safetensors
    /// checkpoint (a file, an index, or a folder with one).
    Load(BenchLoad),
    /// How fast the drive is, by engine, size of reads, and reads in flight
    ///
    /// Sequential reads, and whole records of experts from anywhere in the file.
    Io(BenchIo),
    /// One measurement in a process of its own; `bench decode` starts these
    #[command(hide = true)]
    Turn(BenchTurn),
    /// The same for `bench prefill`
    #[command(hide = true)]
    PrefillTurn(BenchPrefillTurn),
    /// The same for `bench load`
    #[command(hide = true)]
    LoadTurn(BenchLoadTurn),
}

/// What is measured in turns, and how often.
#[derive(Debug, Args)]
pub(crate) struct Turns {
    /// What to run beside it, in turns: stock (llama.cpp with the same kernels, mapped file),
    /// stock-repack (with its repacked CPU kernels), stock-cpu-moe (with --gpu: experts on the CPU)
    #[arg(long, value_delimiter = ',')]
    pub(crate) against: Vec<Peer>,
    /// Turns of each
    #[arg(
        long,
        default_value_t = 5,
        allow_negative_numbers = true,
        value_parser = whole(1..=u32::MAX)
    )]
    pub(crate) repeats: u32,
    /// Empty the page cache before each turn (needs root)
    #[arg(long)]
    pub(crate) cold: bool,
}

/// Something to measure against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// llama.cpp as it is, mapped file, the same CPU kernels.
    Stock,
    /// llama.cpp as it is, with weights repacked at load.
    StockRepack,
    /// With --gpu: llama.cpp as it is, with the experts on the CPU, repacked.
    StockCpuMoe,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecode {
    /// Sizes of the expert pool to measure, in turns: sizes, or shares of all experts
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SIZE|N%,...",
        default_value = "100%,50%,25%",
        allow_hyphen_values = true
    )]
    pub(crate) experts: Vec<PoolShare>,
    #[command(flatten)]
    pub(crate) decode: Decode,
}

/// How decoding is measured; the sizes of the pool apart.
#[derive(Debug, Args)]
pub(crate) struct Decode {
    #[command(flatten)]
    pub(crate) model: LoadArgs,
    #[command(flatten)]
    pub(crate) turns: Turns,
    /// Tokens measured in a turn
    #[arg(
        short,
        default_value_t = 64,
        allow_negative_numbers = true,
        value_parser = whole(1..=1_000_000u32)
    )]
    pub(crate) n: u32,
    /// Tokens before them, not measured
    #[arg(
        long,
        default_value_t = 32,
        allow_negative_numbers = true,
        value_parser = whole(0..=1_000_000u32)
    )]
    pub(crate) warmup: u32,
    /// Replay recorded routing instead of the router's (a trace, in any format that `trace import`
    /// takes), so that a model of random weights moves the experts that a real one would. The first
    /// --warmup and -n of its decoded tokens are replayed, and after the last one the first again
    #[arg(long, value_name = "TRACE")]
    pub(crate) routing: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefill {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Lengths of prompts, in tokens; drawn from the seed, which asks for more experts than text does
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,...",
        default_value = "512,4096",
        allow_negative_numbers = true,
        value_parser = whole(1..=1_000_000u32)
    )]
    pub(crate) tokens: Vec<u32>,
    #[command(flatten)]
    pub(crate) turns: Turns,
}

const LOAD_EXAMPLES: &str = "\
Examples:
  tierstream bench load model.gguf --against mmap,direct
  tierstream bench load model.gguf --warm --against mmap --rounds 9
  scripts/load-peers.sh && tierstream bench load model.gguf checkpoint/ \\
      --against mmap,direct,runai,fastsafetensors,safetensors --json

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = LOAD_EXAMPLES)]
pub(crate) struct BenchLoad {
    /// GGUF files (the first one of a split model), safetensors checkpoints, or `demo`; several are
    /// measured in the same rounds
    #[arg(required = true, value_name = "MODEL")]
    pub(crate) models: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// What to measure beside it: llama.cpp with the file mapped (mmap) or by its own direct reads
    /// (direct), and packages of Python, which read a copy of a GGUF's weights as safetensors
    #[arg(long, value_delimiter = ',')]
    pub(crate) against: Vec<LoadPeer>,
    /// With the page cache empty, which is the default: emptied before each measurement as root, else
    /// the files alone are evicted
    #[arg(long, conflicts_with = "warm")]
    pub(crate) cold: bool,
    /// With the files in the page cache
    #[arg(long)]
    pub(crate) warm: bool,
    /// Do not touch free memory just before each measurement. A hypervisor may take away what is free
    /// for some seconds; whoever uses it next waits for that
    #[arg(long)]
    pub(crate) no_touch: bool,
    /// Rounds, in each of which everything is measured once, in an order of its own
    #[arg(
        long,
        default_value_t = 5,
        allow_negative_numbers = true,
        value_parser = whole(1..=1000u32)
    )]
    pub(crate) rounds: u32,
    /// Where the copies as safetensors lie meanwhile, best on the model's drive; they have no names,
    /// and are as large as the models [default: the folder of each model]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) temp: Option<PathBuf>,
    /// Python with the packages that runai, fastsafetensors and safetensors stand for [default: the
    /// one that scripts/load-peers.sh makes]
    #[arg(long, value_name = "FILE")]
    pub(crate) python: Option<PathBuf>,
}

/// Another loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadPeer {
    /// llama.cpp as it is, with the file mapped.
    Mmap,
    /// llama.cpp as it is, with its own direct I/O.
    Direct,
    /// Run:ai Model Streamer.
    Runai,
    /// fastsafetensors, without GPUDirect Storage.
    Fastsafetensors,
    /// The safetensors package, whose tensors are mapped, and each page of them touched.
    Safetensors,
}

const IO_EXAMPLES: &str = "\
Examples:
  tierstream bench io model.gguf
  tierstream bench io model.gguf --engines uring,pread --blocks 512KiB,1MiB --depths 8 --seconds 20

Exit codes: 0, 1 for errors, 2 for wrong flags.";

#[derive(Debug, Args)]
#[command(after_help = IO_EXAMPLES)]
pub(crate) struct BenchIo {
    /// The file to read: large, and on the drive in question
    pub(crate) file: PathBuf,
    /// Engines: uring, pread, buffered
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "ENGINE,...",
        default_value = "uring,pread,buffered",
        value_parser = io_engine
    )]
    pub(crate) engines: Vec<EngineKind>,
    /// Most bytes of one read, multiples of 4KiB
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "SIZE,...",
        default_value = "128KiB,1MiB,4MiB",
        value_parser = block
    )]
    pub(crate) blocks: Vec<Bytes>,
    /// Reads in flight
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,...",
        default_value = "1,4,16",
        allow_negative_numbers = true,
        value_parser = whole(1..=256u32)
    )]
    pub(crate) depths: Vec<u32>,
    /// In which order
    #[arg(long, value_delimiter = ',', default_value = "sequential,records")]
    pub(crate) orders: Vec<ReadOrder>,
    /// Bytes of a record [default: those of the model's experts, else 2MiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) record: Option<Bytes>,
    /// Rounds, in each of which everything is measured once, in an order of its own
    #[arg(
        long,
        default_value_t = 3,
        allow_negative_numbers = true,
        value_parser = whole(1..=1000u32)
    )]
    pub(crate) rounds: u32,
    /// How long to read in all, shared evenly; a measurement ends no sooner than after 16 reads
    #[arg(
        long,
        default_value_t = 50,
        allow_negative_numbers = true,
        value_parser = whole(1..=86_400u32)
    )]
    pub(crate) seconds: u32,
}

/// Which bytes a measurement of a drive reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReadOrder {
    /// One after the other, from somewhere on.
    Sequential,
    /// Whole records, from anywhere.
    Records,
}

/// Which of the loaders a measurement in a process of its own is of.
#[derive(Debug, Args)]
pub(crate) struct BenchLoadTurn {
    /// A file, or a folder
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// llama.cpp instead: mmap or direct
    #[arg(long)]
    pub(crate) peer: Option<LoadPeer>,
    /// Plain reads instead
    #[arg(long, conflicts_with = "peer")]
    pub(crate) raw: bool,
    /// Bytes of free memory to touch just before
    #[arg(long, default_value_t = 0)]
    pub(crate) touch: u64,
}

#[derive(Debug, Args)]
pub(crate) struct BenchTurn {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Recorded routing
    #[arg(long)]
    pub(crate) routing: Option<PathBuf>,
    /// Run a peer instead of streaming
    #[arg(long)]
    pub(crate) peer: Option<Peer>,
    /// File with the token ids to decode, JSON array; `-`: standard input
    #[arg(long)]
    pub(crate) token_file: PathBuf,
    /// Of these, the first ones are not measured
    #[arg(long, default_value_t = 32)]
    pub(crate) warmup: u32,
}

#[derive(Debug, Args)]
pub(crate) struct BenchPrefillTurn {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long)]
    pub(crate) tokens: u32,
    /// Run a peer instead of streaming
    #[arg(long)]
    pub(crate) peer: Option<Peer>,
}

/// The size of a read.
fn block(text: &str) -> Result<Bytes, String> {
    match text.parse::<Bytes>() {
        Ok(bytes) if bytes.0 % 4096 == 0 && (4096..=1 << 30).contains(&bytes.0) => Ok(bytes),
        Ok(_) => Err("it takes multiples of 4KiB, up to 1GiB".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
