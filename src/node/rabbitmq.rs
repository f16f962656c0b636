//! A private RabbitMQ broker.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use super::process::Process;
use super::{NodeError, answers, command, find, folder, load, lock, log_file, output, ports, save};

const PRODUCT: &str = "RabbitMQ";
/// About 6 s on two idle cores, much more while a build runs beside it.
const START: Duration = Duration::from_secs(90);
/// Closing the queues takes a second or two; after that it is killed, which loses nothing that was confirmed.
const STOP: Duration = Duration::from_secs(20);
/// Half a second on an idle machine; 30 s were seen with eight programs waiting for each core.
const HELPER: Duration = Duration::from_secs(180);

/// How a RabbitMQ node differs from the broker's defaults.
#[derive(Debug, Clone, Default)]
pub struct RabbitOptions {
    /// Enables the management plugin on a port of its own.
    pub management: bool,
    /// More lines of `rabbitmq.conf`.
    pub config: Vec<String>,
}

/// A RabbitMQ broker with ports and an `epmd` of its own at 127.0.0.1: user and password `guest`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Rabbit {
    bin: PathBuf,
    /// Data, cookie, configuration and log.
    home: PathBuf,
    /// The Erlang node: its data belong to this name, so it never changes.
    name: String,
    port: u16,
    dist_port: u16,
    epmd_port: u16,
    management_port: Option<u16>,
    config: Vec<String>,
    process: Option<Process>,
    epmd: Option<Process>,
    #[serde(skip)]
    dir: PathBuf,
    /// Whether dropping the handle ends the node and removes its data.
    #[serde(skip)]
    scoped: bool,
}

impl Rabbit {
    /// Starts a node in `dir/rabbitmq` that is killed, its data removed, when the handle is dropped.
    ///
    /// # Errors
    /// RabbitMQ is not installed, the folder cannot be used, or the broker does not come up.
    pub async fn start(dir: &Path, options: RabbitOptions) -> Result<Rabbit, NodeError> {
        let mut node = Rabbit::prepare(&folder(dir)?, options)?;
        node.scoped = true;
        node.launch_anywhere().await?;
        Ok(node)
    }

    /// The node of `dir` that outlives this process: found, revived on the same data, or made. `options` count for a
    /// new node only.
    ///
    /// # Errors
    /// As [`Rabbit::start`]; also if another process holds the folder's lock for too long.
    pub async fn up(dir: &Path, options: RabbitOptions) -> Result<Rabbit, NodeError> {
        let dir = folder(dir)?;
        let _lock = lock(&dir).await?;
        let mut node = match Rabbit::load(&dir) {
            Some(node) => node,
            None => Rabbit::prepare(&dir, options)?,
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
    pub async fn attach(dir: &Path) -> Option<Rabbit> {
        let mut node = Rabbit::load(&dir.canonicalize().ok()?)?;
        node.is_alive().then_some(node)
    }

    /// The AMQP URL of one of its vhosts; `/` is the default one.
    pub fn url(&self, vhost: &str) -> String {
        let mut path = String::new();
        for byte in vhost.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(char::from(byte));
            } else {
                path.push_str(&format!("%{byte:02x}"));
            }
        }
        format!("amqp://guest:guest@127.0.0.1:{}/{path}", self.port)
    }

    /// The URL of the management plugin, if it was asked for.
    pub fn management_url(&self) -> Option<String> {
        self.management_port.map(|port| format!("http://guest:guest@127.0.0.1:{port}"))
    }

    /// The AMQP port, the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The pid of the Erlang machine that the broker runs in.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.pid)
    }

    /// The broker's log.
    pub fn log(&self) -> PathBuf {
        self.home.join("rabbitmq.log")
    }

    /// Runs `rabbitmqctl` against this node and gives what it prints; about half a second.
    ///
    /// # Errors
    /// It fails or takes over three minutes, e.g. because the node is down or frozen.
    pub async fn ctl(&self, args: &[&str]) -> Result<String, NodeError> {
        let mut ctl = self.command(&self.bin.join("rabbitmqctl"));
        ctl.arg("-q").args(args);
        output(ctl, HELPER).await
    }

    /// Adds a vhost with all permissions for `guest`.
    ///
    /// # Errors
    /// As [`Rabbit::ctl`], or a file cannot be written.
    pub async fn add_vhost(&self, name: &str) -> Result<(), NodeError> {
        // Both in one call: most of a call is the start of its Erlang machine.
        let everything = serde_json::json!({
            "vhosts": [{ "name": name }],
            "permissions": [{ "user": "guest", "vhost": name, "configure": ".*", "write": ".*", "read": ".*" }],
        });
        let path = self.home.join(format!("vhost-{}.json", Uuid::now_v7()));
        fs::write(&path, everything.to_string()).map_err(NodeError::io(&path))?;
        let added = self.ctl(&["import_definitions", &path.to_string_lossy()]).await;
        let _ = fs::remove_file(&path);
        added.map(drop)
    }

    /// Whether the broker runs (or is frozen).
    pub fn is_alive(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_alive)
    }

    /// Sends a signal to the broker's process.
    pub fn signal(&mut self, signal: &str) {
        if let Some(process) = &mut self.process {
            process.signal(signal);
        }
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub fn freeze(&mut self) {
        self.signal("STOP");
    }

    /// Ends [`Rabbit::freeze`].
    pub fn thaw(&mut self) {
        self.signal("CONT");
    }

    /// SIGKILL to the broker and its helpers. All are gone on return, except its `epmd`.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill_tree();
        }
    }

    /// Runs it again on the same port and data, after a stop if it still runs, and waits until it takes connections.
    ///
    /// # Errors
    /// The broker does not come up.
    pub async fn restart(&mut self) -> Result<(), NodeError> {
        self.stop().await?;
        self.launch().await
    }

    /// Orderly shutdown, then SIGKILL if that takes over 20 s; ends its `epmd` too. The data stay.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub async fn stop(&mut self) -> Result<(), NodeError> {
        self.thaw();
        self.signal("TERM");
        if let Some(process) = &mut self.process {
            process.ended(STOP).await;
        }
        self.kill_all();
        self.save()
    }

    fn kill_all(&mut self) {
        self.kill9();
        if let Some(mut epmd) = self.epmd.take() {
            epmd.kill_tree();
        }
    }

    fn prepare(dir: &Path, options: RabbitOptions) -> Result<Rabbit, NodeError> {
        // `/usr/sbin/rabbitmq-server` of the packages is a wrapper that switches to user rabbitmq: the real one is first.
        let folders = ["/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin"];
        let bin = find(folders.map(PathBuf::from).to_vec(), &["rabbitmq-server", "rabbitmqctl"])
            .ok_or(NodeError::Missing { product: PRODUCT, program: "rabbitmq-server" })?;
        let port = ports::free()?;
        let node = Rabbit {
            bin,
            home: folder(&dir.join("rabbitmq"))?,
            name: format!("oncebox-{}@localhost", Uuid::now_v7().simple()),
            port,
            dist_port: ports::free()?,
            epmd_port: ports::free()?,
            management_port: options.management.then(ports::free).transpose()?,
            config: options.config,
            process: None,
            epmd: None,
            dir: dir.to_owned(),
            scoped: false,
        };
        // Data of an earlier node have another name and would never be read again.
        let _ = fs::remove_dir_all(node.home.join("data"));
        Ok(node)
    }

    /// The files the broker reads at its start; each stands in for one under `/etc/rabbitmq`.
    fn configure(&self) -> Result<(), NodeError> {
        let mut config = vec![
            format!("listeners.tcp.1 = 127.0.0.1:{}", self.port),
            "disk_free_limit.absolute = 50MB".to_owned(),
            "log.file = false".to_owned(),
            "log.console = true".to_owned(),
        ];
        if let Some(port) = self.management_port {
            config.push("management.tcp.ip = 127.0.0.1".to_owned());
            config.push(format!("management.tcp.port = {port}"));
        }
        config.extend(self.config.iter().cloned());
        let plugins = if self.management_port.is_some() { "[rabbitmq_management]." } else { "[]." };
        let files = [
            ("rabbitmq.conf", config.join("\n") + "\n"),
            ("advanced.config", "[].\n".to_owned()),
            ("enabled_plugins", format!("{plugins}\n")),
        ];
        for (name, text) in files {
            let path = self.home.join(name);
            fs::write(&path, text).map_err(NodeError::io(&path))?;
        }
        Ok(())
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = command(program, &self.home);
        let paths = [
            ("HOME", ""),
            ("RABBITMQ_MNESIA_BASE", "data"),
            ("RABBITMQ_LOG_BASE", "log"),
            ("RABBITMQ_PID_FILE", "pid"),
            ("RABBITMQ_GENERATED_CONFIG_DIR", "config"),
            ("RABBITMQ_CONFIG_FILE", "rabbitmq.conf"),
            ("RABBITMQ_CONFIG_FILES", "conf.d/*.conf"),
            ("RABBITMQ_ADVANCED_CONFIG_FILE", "advanced.config"),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", "enabled_plugins"),
        ];
        command.envs(paths.map(|(name, path)| (name, self.home.join(path))));
        command.env("ERL_EPMD_ADDRESS", "127.0.0.1").env("ERL_EPMD_PORT", self.epmd_port.to_string());
        command.env("RABBITMQ_CONF_ENV_FILE", "/dev/null").env("RABBITMQ_NODENAME", &self.name);
        command.env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1").env("RABBITMQ_NODE_PORT", self.port.to_string());
        command.env("RABBITMQ_DIST_PORT", self.dist_port.to_string());
        // The script then becomes the Erlang machine instead of waiting beside it: our child is the broker.
        command.env("RUNNING_UNDER_SYSTEMD", "true");
        // Idle schedulers sleep instead of spinning, for the programs that share the cores; the last flag is the marker.
        let loopback = "-kernel inet_dist_use_interface {127,0,0,1}";
        let server = format!("+sbwt none +sbwtdcpu none +sbwtdio none {loopback} -oncebox {}", self.name);
        command.env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", server).env("RABBITMQ_CTL_ERL_ARGS", loopback);
        // Any free port: the default range has room for ten calls of rabbitmqctl at a time.
        command.env("RABBITMQ_CTL_DIST_PORT_MIN", "0").env("RABBITMQ_CTL_DIST_PORT_MAX", "0");
        if !self.scoped {
            command.process_group(0);
        }
        command
    }

    /// As `launch`, on other ports if someone has taken ours meanwhile.
    async fn launch_anywhere(&mut self) -> Result<(), NodeError> {
        match self.launch().await {
            Err(error) if error.is_port_clash() => {
                (self.port, self.dist_port, self.epmd_port) = (ports::free()?, ports::free()?, ports::free()?);
                self.management_port = self.management_port.map(|_| ports::free()).transpose()?;
                self.launch().await
            }
            other => other,
        }
    }

    async fn launch(&mut self) -> Result<(), NodeError> {
        self.configure()?;
        let log = self.log();
        let file = log_file(&log)?;
        let copy = || file.try_clone().map_err(NodeError::io(&log));
        // Started here and not by the broker, which would leave it running and its pid unknown.
        if !self.epmd.as_mut().is_some_and(Process::is_alive) {
            let mut epmd = self.command(Path::new("epmd"));
            let port = self.epmd_port.to_string();
            epmd.args(["-port", &port, "-address", "127.0.0.1"]).stdout(copy()?).stderr(copy()?);
            let missing = |_| NodeError::Missing { product: "Erlang", program: "epmd" };
            self.epmd = Some(Process::spawn(&mut epmd, format!("epmd -port {port} ")).map_err(missing)?);
        }
        let program = self.bin.join("rabbitmq-server");
        let mut server = self.command(&program);
        server.stdout(copy()?).stderr(copy()?);
        let process = Process::spawn(&mut server, format!("-oncebox {}", self.name));
        self.process = Some(process.map_err(NodeError::io(&program))?);
        // Before it answers: if this process ends meanwhile, the next one still finds the broker.
        self.save()?;
        let answered = self.answers().await;
        if answered.is_err() {
            self.kill_all();
            self.save()?;
        }
        answered
    }

    /// Waits until the broker takes connections, which is the last thing its boot arranges.
    async fn answers(&mut self) -> Result<(), NodeError> {
        let (log, port) = (self.log(), self.port);
        let runs = || self.epmd.as_mut().is_some_and(Process::is_alive) && self.is_alive();
        answers((PRODUCT, &log, START), runs, async || greet(port).await).await
    }

    fn save(&self) -> Result<(), NodeError> {
        if self.scoped { Ok(()) } else { save(&self.dir.join("rabbitmq.json"), self) }
    }

    fn load(dir: &Path) -> Option<Rabbit> {
        let mut node: Rabbit = load(&dir.join("rabbitmq.json"))?;
        node.dir = dir.to_owned();
        (node.home.is_dir() && node.bin.is_dir()).then_some(node)
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        if self.scoped {
            self.kill_all();
            let _ = fs::remove_dir_all(&self.home);
        }
    }
}

/// The protocol header of AMQP 0-9-1; a method frame (`Connection.Start`) means it takes connections.
async fn greet(port: u16) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"AMQP\0\0\x09\x01").await?;
    Ok(stream.read_u8().await? == 1)
}
