//! https to Patroni: certificates that the agent accepts, and the error for each that it does not.

use crate::common::{FakePatroni, PRIMARY, READY, check, file, http, read_request};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion,
};
use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

fn pem(name: &str) -> String {
    file(&format!("tests/data/tls/{name}")).to_str().expect("UTF-8").to_owned()
}

fn certificate(name: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(pem(name)).expect("a certificate")
}

/// A fake Patroni with this certificate, which may require one of its client.
fn patroni(
    name: &str,
    client_ca: Option<&str>,
    version: &'static SupportedProtocolVersion,
) -> FakePatroni {
    let provider = Arc::new(ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[version])
        .expect("a version");
    let config = match client_ca {
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots.add(certificate(ca)).expect("a CA");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            config.with_client_cert_verifier(verifier.build().expect("a verifier"))
        }
        None => config.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_file(pem(&format!("{name}.key"))).expect("a key");
    let key = ring::default_provider().key_provider.load_private_key(key).expect("a key");
    // a resolver sends any certificate, some of which rustls would refuse
    let chain = CertificateDer::pem_file_iter(pem(&format!("{name}.pem"))).expect("certificates");
    let chain = chain.collect::<Result<_, _>>().expect("certificates");
    let shown = CertifiedKey::new(chain, key);
    let config = Arc::new(config.with_cert_resolver(Arc::new(SingleCertAndKey::from(shown))));
    FakePatroni::on("127.0.0.1:0", move |stream, requests| {
        let connection = ServerConnection::new(config.clone()).expect("a connection");
        let mut stream = StreamOwned::new(connection, stream);
        let request = read_request(&mut stream);
        if request.is_empty() {
            return;
        }
        requests.lock().expect("no panic").push(request);
        let _ = stream.write_all(&http(200, PRIMARY));
        stream.conn.send_close_notify();
        let _ = stream.flush();
        let _ = stream.sock.read(&mut [0]);
    })
}

fn patroni_with(name: &str) -> FakePatroni {
    patroni(name, None, &rustls::version::TLS13)
}

/// Makes a check with these options besides the URL, which is https on 127.0.0.1.
fn ask(patroni: &FakePatroni, options: &[&str]) -> String {
    let url = format!("https://{}", patroni.address);
    let outcome = check(&[&["--url", &url, "--timeout", "10s"], options].concat());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    outcome.reply
}

/// The reply with this reason, cut to its length.
fn down(patroni: &FakePatroni, reason: &str) -> String {
    let reason = format!("Patroni {}: {reason}", patroni.address);
    format!("down ready # {}\n", reason.chars().take(100).collect::<String>())
}

#[test]
fn a_ca_in_cacert_is_trusted() {
    let patroni = patroni_with("server");
    assert_eq!(ask(&patroni, &["--cacert", &pem("ca.pem")]), READY);
    let old = self::patroni("server", None, &rustls::version::TLS12);
    assert_eq!(ask(&old, &["--cacert", &pem("ca.pem")]), READY);
    assert_eq!(patroni.connections(), 1);
}

#[test]
fn localhost_is_verified_as_localhost() {
    let patroni = patroni_with("server");
    let url = format!("https://localhost:{}", patroni.address.port());
    let outcome = check(&["--url", &url, "--cacert", &pem("ca.pem"), "--timeout", "10s"]);
    assert_eq!(outcome.reply, READY);
}

#[test]
fn another_ca_is_not_trusted() {
    let patroni = patroni_with("server");
    let reply = ask(&patroni, &["--cacert", &pem("other-ca.pem")]);
    assert_eq!(reply, down(&patroni, "its certificate is not signed by the CA in --cacert"));
    assert_eq!(ask(&patroni, &["--insecure"]), READY);
    assert_eq!(ask(&patroni, &["-k", "--cacert", &pem("other-ca.pem")]), READY);
}

/// Certificates as `openssl req -x509` makes them.
#[test]
fn a_ca_that_is_also_the_servers_certificate_is_trusted() {
    let patroni = patroni_with("own");
    assert_eq!(ask(&patroni, &["--cacert", &pem("own.pem")]), READY);
    let old = self::patroni("own", None, &rustls::version::TLS12);
    assert_eq!(ask(&old, &["--cacert", &pem("own.pem")]), READY);
    let hint = "its certificate is a CA's (CA:TRUE): put this very certificate into --cacert";
    assert_eq!(ask(&patroni, &["--cacert", &pem("ca.pem")]), down(&patroni, hint));
    let named = patroni_with("own-named");
    let reply = ask(&named, &["--cacert", &pem("own-named.pem")]);
    assert!(reply.contains("certificate is not for 127.0.0.1"), "{reply}");
    // another key with the same name is not trusted
    let reply = ask(&named, &["--cacert", &pem("own.pem")]);
    assert_eq!(reply, down(&named, hint));
}

/// Whoever has signed it.
#[test]
fn a_servers_certificate_in_cacert_is_trusted() {
    assert_eq!(ask(&patroni_with("server"), &["--cacert", &pem("server.pem")]), READY);
    let other = patroni_with("expired");
    let reply = ask(&other, &["--cacert", &pem("expired.pem")]);
    assert_eq!(reply, down(&other, "its certificate has expired"));
    let reply = ask(&other, &["--cacert", &pem("server.pem")]);
    assert!(reply.starts_with("down ready # "), "{reply}");
    let named = patroni_with("named");
    let reply = ask(&named, &["--cacert", &pem("named.pem")]);
    assert!(reply.contains("certificate is not for 127.0.0.1"), "{reply}");
    let stranger = patroni_with("named");
    let reply = ask(&stranger, &["--cacert", &pem("server.pem")]);
    assert_eq!(reply, down(&stranger, "its certificate is not signed by the CA in --cacert"));
}

/// As with curl, a certificate in `--cacert` vouches for others only if it is a CA that may sign.
#[test]
fn a_certificate_that_is_no_ca_vouches_for_no_other() {
    for (name, signed) in [("server", "by-server"), ("own-usage", "by-own-usage")] {
        let cacert = pem(&format!("{name}.pem"));
        assert_eq!(ask(&patroni_with(name), &["--cacert", &cacert]), READY, "{name}");
        let other = patroni_with(signed);
        let reply = ask(&other, &["--cacert", &cacert]);
        assert_eq!(reply, down(&other, "its certificate is not signed by the CA in --cacert"));
    }
}

/// A CA with `pathlen:0` vouches for servers and for no other CA, as with curl; one with `pathlen:1` for one CA.
#[test]
fn a_ca_below_a_ca_that_allows_none() {
    let ask = |chain, cacert: &str| {
        let patroni = patroni_with(chain);
        (ask(&patroni, &["--cacert", &pem(cacert)]), patroni)
    };
    assert_eq!(ask("by-last", "last.pem").0, READY, "signed by it");
    let (reply, patroni) = ask("by-below-last", "last.pem");
    assert_eq!(reply, down(&patroni, "its certificate is not signed by the CA in --cacert"));
    assert_eq!(ask("by-below-next", "next.pem").0, READY, "one CA between them is allowed");
    let (reply, patroni) = ask("by-below-below-next", "next.pem");
    assert_eq!(reply, down(&patroni, "its certificate is not signed by the CA in --cacert"));
    assert_eq!(
        ask("by-below-below-next", "below-next.pem").0,
        READY,
        "the CA below is trusted itself"
    );
}

#[test]
fn a_certificate_that_cannot_be_used_gets_a_hint() {
    for (name, reason) in [
        (
            "nameless",
            "its certificate has no subjectAltName, and its CN does not count: make one that has",
        ),
        ("version1", "its certificate has X.509 version 1; make one with version 3"),
        (
            "sha1",
            "its certificate needs RSA from 2048 bits, P-256 or P-384 with SHA-256 or SHA-384, or Ed25519",
        ),
    ] {
        let patroni = patroni_with(name);
        assert_eq!(ask(&patroni, &["--cacert", &pem("ca.pem")]), down(&patroni, reason), "{name}");
        assert_eq!(ask(&patroni, &["-k"]), READY, "{name}");
    }
    let patroni = patroni_with("client-only");
    let reason = "its certificate is not for a server: extendedKeyUsage lacks serverAuth";
    assert_eq!(ask(&patroni, &["--cacert", &pem("own.pem")]), down(&patroni, reason));
}

#[test]
fn an_expired_certificate_is_refused() {
    let patroni = patroni_with("expired");
    let reply = ask(&patroni, &["--cacert", &pem("ca.pem")]);
    assert_eq!(reply, down(&patroni, "its certificate has expired"));
    assert_eq!(ask(&patroni, &["-k"]), READY);
}

#[test]
fn a_certificate_without_the_address_gets_a_hint() {
    let patroni = patroni_with("named");
    let cacert = pem("ca.pem");
    let reply = ask(&patroni, &["--cacert", &cacert]);
    let reason =
        "certificate is not for 127.0.0.1: use its name in --url and --connect-to 127.0.0.1";
    assert_eq!(reply, down(&patroni, reason));
    // and the hint works
    let port = patroni.address.port();
    let url = format!("https://pg1.example:{port}");
    for target in ["127.0.0.1".to_owned(), format!("127.0.0.1:{port}"), format!("localhost:{port}")]
    {
        let outcome = check(&[
            "--url",
            &url,
            "--connect-to",
            &target,
            "--cacert",
            &cacert,
            "--timeout",
            "10s",
        ]);
        assert_eq!(outcome.reply, READY);
    }
    assert!(patroni.requests()[0].contains(&format!("pg1.example:{port}")));
}

#[test]
fn a_client_certificate_is_sent_if_patroni_requires_one() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let patroni = patroni("server", Some("ca.pem"), version);
        let (cacert, cert, key) = (pem("ca.pem"), pem("client.pem"), pem("client.key"));
        assert_eq!(ask(&patroni, &["--cacert", &cacert, "--cert", &cert, "--key", &key]), READY);

        let reply = ask(&patroni, &["--cacert", &cacert]);
        let (_, reason) = reply.split_once(&format!("{}: ", patroni.address)).expect("a reason");
        assert!(reason.contains("--cert"), "{reply}");
        assert!(reply.starts_with("down ready # "), "{reply}");

        let stranger = ["--cert", &pem("stranger.pem"), "--key", &pem("stranger.key")];
        let reply = ask(&patroni, &[&["--cacert", cacert.as_str()], &stranger[..]].concat());
        assert!(reply.starts_with("down ready # "), "{reply}");
        assert!(reply.contains("--cert"), "{reply}");
    }
}

#[test]
fn certificate_and_key_may_be_in_one_file() {
    let patroni = patroni("server", Some("ca.pem"), &rustls::version::TLS13);
    let both = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("both.pem");
    let text = [pem("client.pem"), pem("client.key")]
        .map(|file| std::fs::read_to_string(file).expect("a file"));
    // with as much text between them as openssl prints of a long chain
    let long = "Signature Algorithm: ED25519\n".repeat(10_000);
    std::fs::write(&both, text.join(&long)).expect("a file");
    let both = both.to_str().expect("UTF-8");
    assert_eq!(ask(&patroni, &["--cacert", &pem("ca.pem"), "--cert", both]), READY);
}

/// The CA that signed a certificate knows why it is refused, and the others in `--cacert` do not.
#[test]
fn the_reason_is_that_of_the_ca_which_signed() {
    let patroni = patroni_with("by-last");
    let (first, both) =
        (pem("last.pem"), PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cas.pem"));
    let text = [&first, &pem("ca.pem")].map(|file| fs::read_to_string(file).expect("a file"));
    fs::write(&both, text.concat()).expect("a file");
    let url = format!("https://pg9.example:{}", patroni.address.port());
    let both = both.to_str().expect("UTF-8");
    for cacert in [&first, both] {
        let options = ["--url", &url, "--connect-to", "127.0.0.1", "--cacert", cacert];
        let reply = check(&[&options[..], &["--timeout", "10s"]].concat()).reply;
        assert!(reply.contains("certificate is not for pg9.example"), "{reply}");
    }
}

#[test]
fn files_that_cannot_be_used_are_refused() {
    let patroni = patroni_with("server");
    let (ca, cert, key) = (pem("ca.pem"), pem("client.pem"), pem("client.key"));
    let half = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("half.pem");
    let text = std::fs::read(&ca).expect("a file");
    std::fs::write(&half, &text[..text.len() / 2]).expect("a file");
    let half = half.to_str().expect("UTF-8");
    let fifo = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fifo");
    let _ = std::fs::remove_file(&fifo);
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    let fifo = fifo.to_str().expect("UTF-8");
    let bad: [&[&str]; 10] = [
        &["--cacert", fifo],
        &["--cacert", "/dev/zero"],
        &["--cacert", "/nonexistent/ca.pem"],
        &["--cacert", "/"],
        &["--cacert", &key],
        &["--cacert", half],
        &["--cacert", &ca, "--cert", &key],
        &["--cacert", &ca, "--cert", &cert, "--key", &ca],
        &["--cacert", &ca, "--cert", &cert, "--key", &pem("stranger.key")],
        &["--cacert", &ca, "--cert", half, "--key", &key],
    ];
    for options in bad {
        let reply = ask(&patroni, options);
        assert!(reply.starts_with("down ready # "), "{options:?}: {reply}");
        assert!(!reply.contains("bug in"), "{options:?}: {reply}");
    }
    assert_eq!(patroni.connections(), 0);
}

#[test]
fn https_to_a_server_that_speaks_http() {
    // Patroni takes the bytes for the beginning of a request, and waits for the rest
    let patroni = FakePatroni::new(|_| {});
    let url = format!("https://{}", patroni.address);
    let outcome = check(&["--url", &url, "-k", "--timeout", "300ms"]);
    assert_eq!(outcome.reply, down(&patroni, "no answer before the deadline (--timeout)"));
    // a server that answers at once
    let patroni = FakePatroni::raw(|mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"<!DOCTYPE HTML>");
    });
    assert_eq!(
        ask(&patroni, &["-k"]),
        down(&patroni, "it does not speak TLS; should --url be http://?")
    );
}

/// OpenSSL refuses a client that has no version or cipher in common with it, by these alerts.
#[test]
fn a_handshake_that_is_refused_gets_a_hint() {
    for (alert, reason) in [
        (
            40,
            "HandshakeFailure: it requires --cert and --key, or its key is not RSA, P-256, P-384 or Ed25519",
        ),
        (70, "it speaks neither TLS 1.2 nor 1.3"),
        (80, "it refused the TLS connection: InternalError (--cert, --key)"),
    ] {
        let patroni = FakePatroni::raw(move |mut stream| {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&[21, 3, 3, 0, 2, 2, alert]);
        });
        assert_eq!(ask(&patroni, &["-k"]), down(&patroni, reason));
    }
}

#[test]
fn http_to_a_server_that_speaks_https() {
    let patroni = patroni_with("server");
    let outcome = check(&["--url", &patroni.url(), "--timeout", "10s"]);
    assert!(outcome.reply.starts_with("down ready # "), "{outcome:?}");
    // Patroni closes such a connection without an alert
    let patroni = FakePatroni::raw(drop);
    let outcome = check(&["--url", &patroni.url(), "--timeout", "10s"]);
    let reason = "closed the connection early: is it stopping, or does it require https?";
    assert_eq!(outcome.reply, down(&patroni, reason));
}

#[test]
fn a_silent_handshake() {
    let patroni =
        FakePatroni::raw(|_stream| std::thread::sleep(std::time::Duration::from_secs(30)));
    let url = format!("https://{}", patroni.address);
    let outcome = check(&["--url", &url, "-k", "--timeout", "300ms"]);
    assert_eq!(outcome.reply, down(&patroni, "no answer before the deadline (--timeout)"));
    assert!(outcome.took < std::time::Duration::from_secs(15));
}

/// Patroni's answer comes in two records, the second one after the acknowledgement of the first, and a delayed
/// acknowledgement would cost 40 ms. The kernel forgets the setting after each write.
#[test]
#[ignore = "needs strace: tests/run"]
fn the_agent_acknowledges_at_once() {
    let patroni = patroni_with("server");
    let trace = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("acknowledgements");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", "trace=setsockopt,recvfrom", "-o"]);
    strace.arg(&trace).arg(env!("CARGO_BIN_EXE_patroni-agent-check")).stdin(Stdio::null());
    strace.args(["--url", &format!("https://{}", patroni.address), "--cacert", &pem("ca.pem")]);
    let said = strace.output().expect("strace; see tests/install").stdout;
    assert_eq!(String::from_utf8_lossy(&said), READY);
    let trace = fs::read_to_string(trace).expect("the trace");
    let calls: Vec<_> =
        trace.lines().filter(|call| call.contains("recv") || call.contains("QUICKACK")).collect();
    assert!(calls.len() >= 4, "{trace}");
    for pair in calls.chunks(2) {
        let [setting, reading] = pair else { panic!("{trace}") };
        assert!(setting.contains("TCP_QUICKACK, [1]") && reading.contains("recvfrom"), "{trace}");
    }
}
