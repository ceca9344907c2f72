#!/bin/sh -e
# A root, an intermediate and a leaf with URI by openssl; KEY says what keys. Leaves ca.crt, tls.crt
# (leaf, then intermediate), tls.key, revoked.pem (the intermediate's list with the leaf in it), and
# traditional.key where a key has an older form.
genkey() { openssl genpkey $KEY -out "$1"; chmod 600 "$1"; }

cat > ca.cnf <<END
[req]
distinguished_name = dn
[dn]
[root]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = URI:$URI
[ca]
default_ca = own
[own]
database = index.txt
crlnumber = crlnumber
default_md = default
default_crl_days = 30
certificate = middle.crt
private_key = middle.key
END

genkey root.key
openssl req -new -x509 -config ca.cnf -extensions root -key root.key -subj "/O=Made elsewhere/CN=Root" \
    -days 30 -out ca.crt

genkey middle.key
openssl req -new -config ca.cnf -key middle.key -subj "/O=Made elsewhere/CN=Middle" -out middle.csr
openssl x509 -req -in middle.csr -CA ca.crt -CAkey root.key -set_serial 2 -days 30 \
    -extfile ca.cnf -extensions root -out middle.crt

genkey tls.key
openssl req -new -config ca.cnf -key tls.key -subj "/CN=leaf" -out leaf.csr
openssl x509 -req -in leaf.csr -CA middle.crt -CAkey middle.key -set_serial 3 -days 30 \
    -extfile ca.cnf -extensions leaf -out leaf.crt
cat leaf.crt middle.crt > tls.crt

: > index.txt
echo 01 > crlnumber
openssl ca -config ca.cnf -revoke leaf.crt
openssl ca -config ca.cnf -gencrl -out revoked.pem

case "$KEY" in
*ED25519*) ;;
*) openssl pkey -in tls.key -traditional -out traditional.key && chmod 600 traditional.key ;;
esac
