//! A real HTTP client and a real HTTP server.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{Netns, Owner, Process, deadline::wait_until, leftovers::temp_dir};

/// How long one request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Asks for `path` at `server`, from a socket of `owner` in `netns`, on a
/// connection of its own.
///
/// # Errors
///
/// What the client says when there is no answer; a status such as 404 is one.
pub fn get(
    netns: &Netns,
    owner: Owner,
    server: SocketAddr,
    path: &str,
) -> Result<Response, String> {
    let url = format!("http://{server}{path}");
    netns.run(|| {
        owner.assume();
        get_from_here(&url)
    })
}

/// Asks for a URL from the namespace of the calling thread.
///
/// # Errors
///
/// As [`get`].
pub fn get_from_here(url: &str) -> Result<Response, String> {
    let client = ureq::Agent::new_with_config(
        ureq::Agent::config_builder()
            // Not the proxy that the environment may name.
            .proxy(None)
            .http_status_as_error(false)
            .timeout_global(Some(REQUEST_DEADLINE))
            .build(),
    );
    let mut response = client.get(url).call().map_err(|e| format!("{url}: {e}"))?;
    Ok(Response {
        status: response.status().as_u16(),
        body: response
            .body_mut()
            .read_to_string()
            .map_err(|error| format!("{url}: {error}"))?,
    })
}

/// BusyBox's web server, as a process of its own.
#[derive(Debug)]
pub struct HttpServer {
    process: Process,
    _files: tempfile::TempDir,
}

impl HttpServer {
    /// Serves `body` as `/` on `port`, as `owner`; it answers when this returns.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn start(netns: &Netns, owner: Owner, port: u16, body: &str) -> Self {
        let files = temp_dir("www");
        std::fs::write(files.path().join("index.html"), body).expect("a new file");
        make_readable(files.path());
        let mut command = netns.command("busybox", owner);
        command
            .args(["httpd", "-f", "-vv", "-p", &port.to_string(), "-h"])
            .arg(files.path());
        let process = Process::spawn("busybox httpd", &mut command);
        let local = SocketAddr::from((IpAddr::from([127, 0, 0, 1]), port));
        wait_until("the web server", || {
            assert!(
                !process.has_exited(),
                "the web server has ended: {}",
                process.output()
            );
            get(netns, owner, local, "/")
        });
        Self {
            process,
            _files: files,
        }
    }

    /// What it has logged: a line with the client's address for each request.
    pub fn log(&self) -> String {
        self.process.output()
    }
}

/// For a server that is not root.
fn make_readable(directory: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory, permissions).expect("our own directory");
}
