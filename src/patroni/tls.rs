//! TLS to Patroni. In go PEM files, out comes a configuration that trusts no public CA. Knows nothing of sockets.

use super::answer::{Cause, NoAnswer};
use crate::file;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme,
};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The longest PEM file in bytes.
const SIZE_LIMIT: u64 = 1024 * 1024;

/// The TLS options, which are named as curl's are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// `--cacert`: a PEM file with the CA of Patroni's certificate, or with that certificate itself.
    pub cacert: Option<PathBuf>,
    /// `--cert`: a PEM file with the client certificate.
    pub cert: Option<PathBuf>,
    /// `--key`: a PEM file with the client certificate's key.
    pub key: Option<PathBuf>,
    /// `--insecure`: Patroni's certificate is not verified.
    pub insecure: bool,
}

impl Tls {
    /// Reads the files and builds the configuration.
    pub fn build_config(&self) -> Result<Arc<ClientConfig>, NoAnswer> {
        let provider = Arc::new(ring::default_provider());
        let trusted =
            self.cacert.as_deref().map(|file| read_trusted(file, &provider)).transpose()?;
        let trusted = match self.insecure {
            true => None,
            false => Some(trusted.ok_or("https needs --cacert FILE or --insecure".to_owned())?),
        };
        let verifier = Verifier { provider: provider.clone(), trusted };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &self.cert {
            Some(file) => {
                let chain = read_certificates(file)?;
                let key_file = self.key.as_deref().unwrap_or(file);
                let key = read_private_key(key_file)?;
                builder.with_client_auth_cert(chain, key).map_err(|error| {
                    format!("{} and {}: {error}", file.display(), key_file.display())
                })?
            }
            None => builder.with_no_client_auth(),
        };
        // there is no second connection
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// The certificates that the agent trusts: those in `--cacert`, and those that a CA among them has signed.
#[derive(Debug)]
struct Trusted {
    certificates: Vec<CertificateDer<'static>>,
    /// Treats every certificate in `--cacert` as a CA.
    all: Arc<WebPkiServerVerifier>,
    /// Treats only CAs in `--cacert` as CAs; the keys are path length constraints.
    signed: BTreeMap<usize, Arc<WebPkiServerVerifier>>,
}

fn read_trusted(file: &Path, provider: &Arc<CryptoProvider>) -> Result<Trusted, NoAnswer> {
    let certificates = read_certificates(file)?;
    let verifier = |certificates: Vec<CertificateDer<'static>>| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates);
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()
    };
    let all =
        verifier(certificates.clone()).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut cas: BTreeMap<usize, Vec<_>> = BTreeMap::new();
    for certificate in &certificates {
        if let Some(limit) = read_path_limit(certificate) {
            cas.entry(limit).or_default().push(certificate.clone());
        }
    }
    let signed = cas.into_iter().filter_map(|(limit, cas)| Some((limit, verifier(cas).ok()?)));
    let signed = signed.collect();
    Ok(Trusted { certificates, all, signed })
}

/// The path length that this CA allows by OpenSSL's rules, the largest number if it has no limit; `None` if the certificate
/// is no CA. Its basic constraints decide, or without them its key usage. A version 1 certificate has no extensions and
/// counts as a CA. A key usage must include keyCertSign. webpki ignores the path length of a trust anchor.
fn read_path_limit(certificate: &[u8]) -> Option<usize> {
    const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
    const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
    const SEQUENCE: u8 = 0x30;
    const INTEGER: u8 = 2;
    const TRUE: (u8, &[u8]) = (1, &[0xff]);
    let whole = parse_der(certificate).first().map_or(vec![], |(_, whole)| parse_der(whole));
    let fields = whole.first().map_or(vec![], |(_, signed)| parse_der(signed));
    let first = fields.first().map(|(tag, _)| *tag);
    // [0] is the version, and [3] are the extensions
    let Some((_, extensions)) = fields.iter().find(|(tag, _)| *tag == 0xa3) else {
        return first.is_some_and(|tag| tag != 0xa0).then_some(usize::MAX);
    };
    let extensions = parse_der(extensions).first().map_or(vec![], |(_, list)| parse_der(list));
    let value = |id: &[u8]| {
        let extensions = extensions.iter().map(|(_, extension)| parse_der(extension));
        let extension = extensions.into_iter().find(|parts| parts.first() == Some(&(6, id)))?;
        parse_der(extension.last()?.1).first().copied()
    };
    // keyCertSign is bit 5
    let signs = value(KEY_USAGE).map(|(_, bits)| bits.get(1).is_some_and(|bits| bits & 4 != 0));
    let Some((SEQUENCE, constraints)) = value(BASIC_CONSTRAINTS) else {
        return (signs == Some(true)).then_some(usize::MAX);
    };
    match parse_der(constraints)[..] {
        [TRUE] if signs != Some(false) => Some(usize::MAX),
        [TRUE, (INTEGER, limit)] if signs != Some(false) => Some(parse_number(limit)),
        _ => None,
    }
}

/// Parses an unsigned number; one that does not fit counts as the largest.
fn parse_number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |number: usize, byte| number.saturating_mul(256) | usize::from(*byte))
}

/// Parses consecutive DER elements into their tags and contents, up to the first that is not valid.
fn parse_der(mut der: &[u8]) -> Vec<(u8, &[u8])> {
    let mut parts = Vec::new();
    while let [tag, length, rest @ ..] = der {
        // a first byte above 128 says in how many bytes the length follows: that byte less 128
        let more = usize::from(length.saturating_sub(0x80));
        let (Some(bytes), true) = (rest.get(..more), more <= 4) else { break };
        let length = if more == 0 { usize::from(*length) } else { parse_number(bytes) };
        let Some(content) = rest.get(more..more + length) else { break };
        parts.push((*tag, content));
        der = &rest[more + length..];
    }
    parts
}

/// Whether a certificate that is itself in `--cacert` is refused only because of its issuer: it is a CA, such as `openssl
/// req -x509` makes, or another CA has signed it. A wrong date is another error.
fn is_issuer_error(error: &CertificateError) -> bool {
    *error == CertificateError::UnknownIssuer
        || matches!(error, CertificateError::Other(error) if error.to_string() == CA_AS_SERVER)
}

/// webpki's name of the error.
const CA_AS_SERVER: &str = "CaUsedAsEndEntity";

/// Verifies certificates as curl does with the same options.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// None with `--insecure`.
    trusted: Option<Trusted>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(Trusted { certificates, all, signed }) = &self.trusted else {
            return Ok(ServerCertVerified::assertion());
        };
        if !certificates.contains(certificate) {
            let between = intermediates.iter().filter(|ca| !certificates.contains(ca));
            let between: Vec<_> = between.cloned().collect();
            let unknown = Error::from(CertificateError::UnknownIssuer);
            let mut error = unknown.clone();
            for (limit, cas) in signed {
                let between = &between[..between.len().min(*limit)];
                match cas.verify_server_cert(certificate, between, name, ocsp, now) {
                    // the verifier with the signing CA has the better reason
                    Err(better) if error == unknown => error = better,
                    Err(_) => {}
                    verified => return verified,
                }
            }
            return Err(error);
        }
        match all.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(Error::InvalidCertificate(error)) if is_issuer_error(&error) => {
                verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verify = |ca: &Trusted| ca.all.verify_tls12_signature(message, certificate, signature);
        self.trusted.as_ref().map_or_else(|| Ok(HandshakeSignatureValid::assertion()), verify)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verify = |ca: &Trusted| ca.all.verify_tls13_signature(message, certificate, signature);
        self.trusted.as_ref().map_or_else(|| Ok(HandshakeSignatureValid::assertion()), verify)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, NoAnswer> {
    file::read(path, SIZE_LIMIT).map_err(|error| NoAnswer {
        cause: Cause::of(&error),
        reason: format!("cannot read {}: {error}", path.display()),
    })
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, NoAnswer> {
    let certificates = CertificateDer::pem_slice_iter(&read(file)?)
        .collect::<Result<Vec<_>, pem::Error>>()
        .map_err(|error| format!("{}: {error}", file.display()))?;
    if certificates.is_empty() {
        return Err(format!("{} contains no PEM certificate", file.display()).into());
    }
    Ok(certificates)
}

fn read_private_key(file: &Path) -> Result<PrivateKeyDer<'static>, NoAnswer> {
    PrivateKeyDer::from_pem_slice(&read(file)?).map_err(|_| {
        format!("{} contains no PEM private key without a passphrase", file.display()).into()
    })
}

/// Explains a TLS error to an operator; none if it is no TLS error. `host` is the host of the URL.
pub fn explain_error(error: &io::Error, host: &str) -> Option<String> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    use CertificateError as Bad;
    use Error::{AlertReceived, InvalidCertificate, InvalidMessage};
    Some(match error {
        InvalidCertificate(Bad::NotValidForNameContext { presented, .. })
            if presented.is_empty() =>
        {
            "its certificate has no subjectAltName, and its CN does not count: make one that has"
                .to_owned()
        }
        InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            format!("certificate is not for {host}: use its name in --url and --connect-to {host}")
        }
        InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "its certificate is not signed by the CA in --cacert".to_owned()
        }
        InvalidCertificate(Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. }) => {
            "its certificate is not for a server: extendedKeyUsage lacks serverAuth".to_owned()
        }
        InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "its certificate has expired".to_owned()
        }
        InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "its certificate is not valid yet: is this machine's clock right?".to_owned()
        }
        InvalidCertificate(
            Bad::UnsupportedSignatureAlgorithmContext { .. }
            | Bad::UnsupportedSignatureAlgorithmForPublicKeyContext { .. },
        ) => {
            "its certificate needs RSA from 2048 bits, P-256 or P-384 with SHA-256 or SHA-384, or Ed25519".to_owned()
        }
        InvalidCertificate(Bad::Other(error)) => match error.to_string().as_str() {
            CA_AS_SERVER => {
                "its certificate is a CA's (CA:TRUE): put this very certificate into --cacert".to_owned()
            }
            "UnsupportedCertVersion" => "its certificate has X.509 version 1; make one with version 3".to_owned(),
            error => format!("its certificate cannot be used: {error}"),
        },
        InvalidMessage(_) => "it does not speak TLS; should --url be http://?".to_owned(),
        AlertReceived(AlertDescription::CertificateRequired) => {
            "it requires a client certificate: --cert and --key".to_owned()
        }
        // OpenSSL with TLS 1.2 sends this if the client certificate is missing, or if the server's key is of another kind
        AlertReceived(AlertDescription::HandshakeFailure) => {
            "HandshakeFailure: it requires --cert and --key, or its key is not RSA, P-256, P-384 or Ed25519".to_owned()
        }
        AlertReceived(AlertDescription::ProtocolVersion) => {
            "it speaks neither TLS 1.2 nor 1.3".to_owned()
        }
        AlertReceived(alert) => format!("it refused the TLS connection: {alert:?} (--cert, --key)"),
        error => format!("TLS: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        [&[tag, u8::try_from(content.len()).expect("a short one")], &content[..]].concat()
    }

    #[test]
    fn basic_constraints_and_key_usage_tell_what_a_ca_may_sign() {
        let (version, serial) = (der(0xa0, &[&[2, 1, 2]]), der(2, &[&[1]]));
        let limit = |fields: &[&[u8]]| read_path_limit(&der(0x30, &[&der(0x30, fields)]));
        assert_eq!(limit(&[&serial]), Some(usize::MAX), "version 1");
        assert_eq!(limit(&[&version, &serial]), None, "no extensions");
        let extension = |id: u8, value: Vec<u8>| {
            der(0x30, &[&der(6, &[&[0x55, 0x1d, id]]), &der(4, &[&value])])
        };
        let basic = |parts: &[&[u8]]| extension(0x13, der(0x30, parts));
        let (is_ca, two) = (&[1, 1, 0xff][..], &[2, 1, 2][..]);
        let signs = extension(0x0f, der(3, &[&[2, 4]]));
        let signs_no_certificate = extension(0x0f, der(3, &[&[5, 0xa0]]));
        for (extensions, allowed) in [
            (vec![basic(&[is_ca])], Some(usize::MAX)),
            (vec![basic(&[is_ca, two])], Some(2)),
            (vec![basic(&[])], None),
            (vec![signs.clone()], Some(usize::MAX)),
            (vec![signs_no_certificate.clone()], None),
            (vec![signs.clone(), basic(&[is_ca])], Some(usize::MAX)),
            (vec![signs.clone(), basic(&[is_ca, two])], Some(2)),
            (vec![signs, basic(&[])], None),
            (vec![signs_no_certificate.clone(), basic(&[is_ca])], None),
            (vec![signs_no_certificate, basic(&[is_ca, two])], None),
        ] {
            let list: Vec<_> = extensions.iter().map(Vec::as_slice).collect();
            let found = limit(&[&version, &serial, &der(0xa3, &[&der(0x30, &list)])]);
            assert_eq!(found, allowed, "{extensions:x?}");
        }
    }
}
