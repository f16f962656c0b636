//! A private PostgreSQL server.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::process::{self, Process};
use super::{NodeError, answers, command, find, folder, load, lock, log_file, output, ports, save};

const PRODUCT: &str = "PostgreSQL";
/// Seconds on a slow disk, more after a crash with much to replay.
const START: Duration = Duration::from_secs(60);
/// A fast shutdown writes one checkpoint; after that it is killed, which loses nothing that was committed.
const STOP: Duration = Duration::from_secs(20);
const HELPER: Duration = Duration::from_secs(60);

/// How a PostgreSQL node differs from the server's defaults.
#[derive(Debug, Clone, Default)]
pub struct PostgresOptions {
    /// Server settings, e.g. `("synchronous_commit", "off")`, over `max_connections=200` and
    /// `max_prepared_transactions=20`. They are given on the command line, so `alter system` does not change them.
    pub settings: Vec<(String, String)>,
}

/// A PostgreSQL server on a port of its own at 127.0.0.1: superuser `oncebox`, no password, fsync on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Postgres {
    bin: PathBuf,
    /// Data, socket and log.
    home: PathBuf,
    port: u16,
    settings: Vec<(String, String)>,
    /// Uid and gid to run as, when we are root.
    account: Option<(u32, u32)>,
    process: Option<Process>,
    #[serde(skip)]
    dir: PathBuf,
    /// Whether dropping the handle ends the node and removes its data.
    #[serde(skip)]
    scoped: bool,
}

impl Postgres {
    /// Starts a node in `dir/postgres` that is killed, its data removed, when the handle is dropped.
    ///
    /// # Errors
    /// PostgreSQL is not installed, the folder cannot be used, or the server does not come up.
    pub async fn start(dir: &Path, options: PostgresOptions) -> Result<Postgres, NodeError> {
        let mut node = Postgres::prepare(&folder(dir)?, options).await?;
        node.scoped = true;
        node.launch_anywhere().await?;
        Ok(node)
    }

    /// The node of `dir` that outlives this process: found, revived on the same data, or made. `options` count for a
    /// new node only.
    ///
    /// # Errors
    /// As [`Postgres::start`]; also if another process holds the folder's lock for too long.
    pub async fn up(dir: &Path, options: PostgresOptions) -> Result<Postgres, NodeError> {
        let dir = folder(dir)?;
        let _lock = lock(&dir).await?;
        let mut node = match Postgres::load(&dir) {
            Some(node) => node,
            None => Postgres::prepare(&dir, options).await?,
        };
        if node.is_alive() {
            node.thaw();
            if node.answers().await.is_ok() {
                return Ok(node);
            }
            node.kill9();
        }
        node.launch_anywhere().await?;
        Ok(node)
    }

    /// The node of `dir` if it runs; neither starts nor ends with this handle.
    pub async fn attach(dir: &Path) -> Option<Postgres> {
        let mut node = Postgres::load(&dir.canonicalize().ok()?)?;
        node.is_alive().then_some(node)
    }

    /// The connection URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://oncebox@127.0.0.1:{}/{database}", self.port)
    }

    /// The TCP port, the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's pid.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.pid)
    }

    /// The path of one of the server's own programs, e.g. `psql` or `pgbench`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.home.join("postgres.log")
    }

    /// Creates a database unless it is there.
    ///
    /// # Errors
    /// The server refuses it or does not answer.
    pub async fn create_database(&self, name: &str) -> Result<(), NodeError> {
        let mut createdb = command(&self.program("createdb"), Path::new("/"));
        createdb.args(["-h", "127.0.0.1", "-U", "oncebox", "-w", "-p", &self.port.to_string(), "--", name]);
        match output(createdb, HELPER).await {
            Err(NodeError::Command { output, .. }) if output.contains("already exists") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether the postmaster runs (or is frozen).
    pub fn is_alive(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_alive)
    }

    /// Sends a signal, e.g. `HUP`, to the postmaster alone.
    pub fn signal(&mut self, signal: &str) {
        if let Some(process) = &mut self.process {
            process.signal(signal);
        }
    }

    /// SIGSTOP to the postmaster and every backend: connections stay open and nothing answers.
    pub fn freeze(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal_tree("STOP");
        }
    }

    /// Ends [`Postgres::freeze`].
    pub fn thaw(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal_tree("CONT");
        }
    }

    /// SIGKILL to the postmaster and every backend: a crash without a last checkpoint. All are gone on return.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill_tree();
        }
    }

    /// Runs it again on the same port and data, after a stop if it still runs.
    ///
    /// # Errors
    /// The server does not come up.
    pub async fn restart(&mut self) -> Result<(), NodeError> {
        self.stop().await?;
        self.launch().await
    }

    /// Fast shutdown, then SIGKILL if that takes over 20 s. The data stay.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub async fn stop(&mut self) -> Result<(), NodeError> {
        self.thaw();
        self.signal("INT");
        if let Some(process) = &mut self.process {
            process.ended(STOP).await;
        }
        self.kill9();
        self.save()
    }

    /// Starts a streaming standby of `primary`, named `standby` to it, in `dir/postgres`. Scoped as with
    /// [`Postgres::start`].
    ///
    /// # Errors
    /// As [`Postgres::start`]; also if the primary cannot be copied.
    pub async fn standby_of(primary: &Postgres, dir: &Path) -> Result<Postgres, NodeError> {
        let mut node = Postgres::place(&folder(dir)?, PostgresOptions { settings: primary.settings.clone() }).await?;
        node.scoped = true;
        let source = format!("host=127.0.0.1 port={} user=oncebox application_name=standby", primary.port);
        let mut copy = node.command("pg_basebackup");
        copy.args(["-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", &source, "-D"]).arg(node.home.join("data"));
        output(copy, HELPER).await?;
        node.launch_anywhere().await?;
        Ok(node)
    }

    /// Makes a standby the primary of a new timeline; it takes writes on return.
    ///
    /// # Errors
    /// It is none, or does not become one.
    pub async fn promote(&self) -> Result<(), NodeError> {
        let mut promote = self.command("pg_ctl");
        promote.args(["promote", "-w", "-s", "-D"]).arg(self.home.join("data"));
        output(promote, HELPER).await.map(drop)
    }

    /// Runs `pg_resetwal` with these arguments, e.g. `["-e", "1"]`, on the data of a stopped or killed server.
    ///
    /// # Errors
    /// The server runs, or pg_resetwal refuses.
    pub async fn reset_wal(&mut self, args: &[&str]) -> Result<(), NodeError> {
        let data = self.home.join("data");
        if !self.is_alive() {
            // A killed server leaves it behind.
            let _ = fs::remove_file(data.join("postmaster.pid"));
        }
        let mut reset = self.command("pg_resetwal");
        reset.args(args).arg("-D").arg(&data);
        output(reset, HELPER).await.map(drop)
    }

    async fn prepare(dir: &Path, options: PostgresOptions) -> Result<Postgres, NodeError> {
        let node = Postgres::place(dir, options).await?;
        node.initdb().await?;
        Ok(node)
    }

    /// A node with a folder and a port, without data.
    async fn place(dir: &Path, options: PostgresOptions) -> Result<Postgres, NodeError> {
        let bin = find(folders(), &["postgres", "initdb", "createdb"])
            .ok_or(NodeError::Missing { product: PRODUCT, program: "initdb" })?;
        let account = if id(&["-u"]).await == Some(0) { Some(account().await?) } else { None };
        let home = home(dir, account)?;
        let settings = options.settings;
        let (process, dir) = (None, dir.to_owned());
        Ok(Postgres { bin, home, port: ports::free()?, settings, account, process, dir, scoped: false })
    }

    /// Makes the data folder unless it is there; under another name first, so that a half-made one is never used.
    async fn initdb(&self) -> Result<(), NodeError> {
        let (data, new) = (self.home.join("data"), self.home.join("data.new"));
        if data.exists() {
            return Ok(());
        }
        let _ = fs::remove_dir_all(&new);
        let mut initdb = self.command("initdb");
        initdb.args(["-A", "trust", "-U", "oncebox", "-E", "UTF8", "--no-locale", "--no-sync", "-D"]).arg(&new);
        output(initdb, HELPER).await?;
        fs::rename(&new, &data).map_err(NodeError::io(&data))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(&self.bin.join(program), &self.home);
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// As `launch`, on another port if someone has taken ours meanwhile.
    async fn launch_anywhere(&mut self) -> Result<(), NodeError> {
        match self.launch().await {
            Err(error) if error.is_port_clash() => {
                self.port = ports::free()?;
                self.launch().await
            }
            other => other,
        }
    }

    async fn launch(&mut self) -> Result<(), NodeError> {
        // After a kill from elsewhere backends can outlive the postmaster, and its pid can be an unreaped zombie's or
        // another process's: the server would refuse to run beside either.
        let data = self.home.join("data");
        if process::kill_in(&data, "postgres") {
            let _ = fs::remove_file(data.join("postmaster.pid"));
            let _ = fs::remove_file(self.home.join(format!(".s.PGSQL.{}.lock", self.port)));
        }
        let log = self.log();
        let file = log_file(&log)?;
        // The kernel limits a socket's path to about 100 bytes; without one there is still TCP.
        let socket = Some(self.home.to_string_lossy()).filter(|path| path.len() < 80 && !path.contains([',', '"']));
        let mut postgres = self.command("postgres");
        postgres.arg("-D").arg(&data);
        let port = self.port.to_string();
        let socket = socket.unwrap_or_default();
        let ours = [("port", &*port), ("listen_addresses", "127.0.0.1"), ("unix_socket_directories", &*socket)];
        let limits = [("max_connections", "200"), ("max_prepared_transactions", "20")];
        let extra = self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in limits.into_iter().chain(extra).chain(ours) {
            postgres.arg("-c").arg(format!("{name}={value}"));
        }
        postgres.stdout(file.try_clone().map_err(NodeError::io(&log))?).stderr(file);
        if !self.scoped {
            postgres.process_group(0);
        }
        let process = Process::spawn(&mut postgres, data.to_string_lossy().into_owned());
        self.process = Some(process.map_err(NodeError::io(&self.program("postgres")))?);
        // Before it answers: if this process ends meanwhile, the next one still finds the server.
        self.save()?;
        let answered = self.answers().await;
        if answered.is_err() {
            self.kill9();
            self.save()?;
        }
        answered
    }

    /// Waits until the server takes connections.
    async fn answers(&mut self) -> Result<(), NodeError> {
        let (log, port) = (self.log(), self.port);
        let runs = || self.is_alive();
        answers((PRODUCT, &log, START), runs, async || greet(port).await).await
    }

    fn save(&self) -> Result<(), NodeError> {
        if self.scoped { Ok(()) } else { save(&self.dir.join("postgres.json"), self) }
    }

    fn load(dir: &Path) -> Option<Postgres> {
        let mut node: Postgres = load(&dir.join("postgres.json"))?;
        node.dir = dir.to_owned();
        (node.home.join("data").is_dir() && node.bin.is_dir()).then_some(node)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.scoped {
            self.kill9();
            let _ = fs::remove_dir_all(&self.home);
            // The link to it, when we are root.
            let _ = fs::remove_file(self.dir.join("postgres"));
        }
    }
}

/// The startup packet of the frontend/backend protocol 3.0; `R` (an authentication answer) means it takes connections.
async fn greet(port: u16) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let body = b"\0\x03\0\0user\0oncebox\0database\0postgres\0\0";
    stream.write_u32(body.len() as u32 + 4).await?;
    stream.write_all(body).await?;
    let answer = stream.read_u8().await?;
    // Terminate, or the log fills with lost connections.
    stream.write_all(b"X\0\0\0\x04").await?;
    Ok(answer == b'R')
}

/// Where PostgreSQL's programs live, newest version first; distributions keep them out of the path.
fn folders() -> Vec<PathBuf> {
    let roots = [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt/homebrew/opt", "postgresql@"),
        ("/usr/local/opt", "postgresql@"),
    ];
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for (root, prefix) in roots {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            found.extend(version.map(|version| (version, entry.path().join("bin"))));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, folder)| folder).collect()
}

async fn id(args: &[&str]) -> Option<u32> {
    let mut id = command(Path::new("id"), Path::new("/"));
    id.args(args);
    output(id, HELPER).await.ok()?.trim().parse().ok()
}

async fn account() -> Result<(u32, u32), NodeError> {
    let ids = (id(&["-u", "postgres"]).await, id(&["-g", "postgres"]).await);
    if let (Some(uid), Some(gid)) = ids { Ok((uid, gid)) } else { Err(NodeError::NoUser) }
}

/// The folder of data, socket and log: `dir/postgres`, or as root a folder of user postgres under the temp folder that
/// `dir/postgres` links to, since that user cannot enter a clone below a folder of mode 0700.
fn home(dir: &Path, account: Option<(u32, u32)>) -> Result<PathBuf, NodeError> {
    let link = dir.join("postgres");
    let Some((uid, gid)) = account else {
        return folder(&link);
    };
    if let Ok(home) = link.canonicalize() {
        return Ok(home);
    }
    let temp = Some(std::env::temp_dir()).filter(|temp| temp.ancestors().all(is_open)).unwrap_or("/tmp".into());
    let temp = folder(&temp)?;
    let home = temp.join(format!("oncebox-{}", uuid::Uuid::now_v7().simple()));
    // Fails if it exists, so that nobody else can have made it.
    DirBuilder::new().mode(0o700).create(&home).map_err(NodeError::io(&home))?;
    chown(&home, Some(uid), Some(gid)).map_err(NodeError::io(&home))?;
    // A link left over from a cleaned temp folder.
    let _ = fs::remove_file(&link);
    symlink(&home, &link).map_err(NodeError::io(&link))?;
    Ok(home)
}

fn is_open(folder: &Path) -> bool {
    fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0)
}
