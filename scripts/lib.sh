# Shared by the scripts here: what a fresh Debian machine needs, and our virtual environment. Sourced, not run.
#
# Every function may be called again: it does nothing where its work is done already.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${UNIONFS_VENV:-$ROOT/.venv}

# A bare environment (cron, CI, chroot) lacks these.
export HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}
export LANG=${LANG:-C.UTF-8}
case ":$PATH:" in *:/usr/sbin:*) ;; *) PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin ;; esac
export PATH

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo -- "$@"
    else die "root is needed for: $* (run as root, or install sudo)"
    fi
}

# What the program itself and its build need. (Debian's pyfuse3 would do on 13, but 12's is too old.)
BASE_PACKAGES=(fuse3 libfuse3-dev pkg-config gcc libc6-dev ca-certificates python3-venv python3-dev)

missing_packages() {
    local package
    for package; do
        # shellcheck disable=SC2016 # dpkg-query's own format, not the shell's
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

apt_get() {
    # RUNLEVEL=1 keeps packages from starting their daemons where no systemd runs; a daemon that tests need they
    # start themselves, with a data root of their own.
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get -qq -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" </dev/null
}

apt_install() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "not Debian: install these yourself: ${missing[*]}"
    say "installing ${missing[*]}"
    # The package lists may be absent, or old enough to name files that are gone: update once and try again.
    apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 && return 0
    apt_get update || die "apt-get update failed"
    apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null ||
        apt_get install -y --no-install-recommends "${missing[@]}" || die "apt could not install: ${missing[*]}"
}

# The distribution's own Python first: a pyenv or conda one may lack headers, ssl or sqlite3.
pick_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        "$candidate" - 2>/dev/null <<'PY' && { echo "$candidate"; return 0; }
import sys, os, sysconfig, ctypes, ensurepip, sqlite3, ssl, venv
ok = sys.version_info >= (3, 11) and os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
sys.exit(not ok)
PY
    done
    die "no Python 3.11 or newer with venv, ssl, sqlite3 and headers was found"
}

# open_fuse: /dev/fuse exists and, where we are root, is open to everybody, as udev leaves it on a booted Debian.
open_fuse() {
    if [ ! -e /dev/fuse ] && [ "$(id -u)" = 0 ]; then
        modprobe fuse 2>/dev/null || true
        [ -e /dev/fuse ] || mknod /dev/fuse c 10 229 2>/dev/null || true
    fi
    [ -e /dev/fuse ] || die "no /dev/fuse: load the module (modprobe fuse), or give the container --device /dev/fuse"
    if [ "$(id -u)" = 0 ]; then chmod 666 /dev/fuse; fi
    [ -w /dev/fuse ] || die "/dev/fuse is not writable for you: chmod 666 /dev/fuse (udev does it on a booted Debian)"
}

# make_venv [EXTRA]: .venv holds this source, installed as a package (not editable: what is tested is what is shipped).
# A .venv that we did not make (a developer's own, maybe editable) is left as it is and used; so is UNIONFS_VENV.
make_venv() {
    local extra=${1:-} stamp=$VENV/unionfs-source want python
    [ -z "${UNIONFS_VENV:-}" ] || return 0
    if [ -x "$VENV/bin/python" ] && [ ! -e "$stamp" ]; then
        "$VENV/bin/python" -c 'import unionfs' 2>/dev/null && { say "using your own .venv"; return 0; }
    fi
    want=$(source_digest "$extra")
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return 0
    python=$(pick_python)
    say "installing into .venv with $python ($("$python" -c 'import platform; print(platform.python_version())'))"
    rm -rf "$VENV" "$ROOT/build"
    "$python" -m venv "$VENV"
    local target=$ROOT${extra:+[$extra]}
    "$VENV/bin/pip" install -qq --disable-pip-version-check "$target" ||
        "$VENV/bin/pip" install -qq --disable-pip-version-check "$target" || die "pip could not install $target"
    rm -rf "$ROOT/build"
    echo "$want" >"$stamp"
}

source_digest() {
    (cd "$ROOT" && { echo "$1"; cat pyproject.toml README.md; find unionfs drivers -name '*.py' -print0 | sort -z |
        xargs -0 sha256sum; } | sha256sum)
}

# minimal_debian CODENAME DIR PACKAGE...: a minbase tree with those packages, unpacked into DIR; made once per machine.
minimal_debian() {
    local codename=$1 dir=$2 cache=${XDG_CACHE_HOME:-/var/cache}/unionfs-tests tar mirror work
    shift 2
    tar=$cache/clean-$codename.tar
    if [ ! -e "$tar" ]; then
        apt_install debootstrap
        mkdir -p "$cache"
        work=$(mktemp -d "$cache/clean-XXXXXX")
        mirror=$(apt-get indextargets --format '$(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
            sed -n 's/^main //p' | grep '/debian/*$' | head -n 1)
        say "debootstrap $codename"
        debootstrap --variant=minbase --include="$(IFS=,; echo "$*")" "$codename" "$work/tree" \
            ${mirror:+"$mirror"} >"$work/log" 2>&1 ||
            { tail -n 20 "$work/log"; die "debootstrap $codename failed"; }
        # A machine that reaches its package mirrors through certificates of its own needs them inside as well.
        cp -r /usr/local/share/ca-certificates/. "$work/tree/usr/local/share/ca-certificates/"
        chroot "$work/tree" update-ca-certificates >/dev/null 2>&1
        tar -C "$work/tree" -cf "$work/tar" .
        mv "$work/tar" "$tar"
        rm -rf "$work"
    fi
    tar -C "$dir" -xf "$tar"
    cp -L /etc/resolv.conf "$dir/etc/resolv.conf"
    cp /etc/hosts "$dir/etc/hosts"
    ln -sf ../proc/self/mounts "$dir/etc/mtab" # a boot makes it, debootstrap doesn't; fusermount3 reads it
}

# in_tree DIR COMMAND...: runs it with DIR as the root. pivot_root, not chroot: a process in a chroot may not make user
# namespaces. All that was started and mounted ends with it.
in_tree() {
    unshare --mount --pid --fork --kill-child bash -euc '
        tree=$1; shift
        mount --bind "$tree" "$tree"
        cd "$tree"
        mount -t proc proc proc
        mount --rbind /sys sys
        mount --rbind /dev dev
        mount -t tmpfs tmpfs run
        mkdir -p .host
        pivot_root . .host
        cd /
        umount -l .host
        rmdir .host
        exec "$@"' in_tree "$@"
}
