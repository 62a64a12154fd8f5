#!/bin/sh
# Runs one libvirt daemon with folders and accounts of its own in place of the machine's:
# libvirt.sh FOLDER QEMU_ID show-kvm|hide-kvm PROGRAM [ARGUMENT...]
# To be started in a mount namespace of its own (unshare -m) with a private /run.
set -eu

folder=$1
qemu_id=$2
kvm=$3
shift 3

for name in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt; do
    mkdir -p "$folder/$name" "/$name"
    mount --bind "$folder/$name" "/$name"
done

# libvirt does not start without its compiled-in user, which only Debian's system package makes.
for name in passwd group; do
    grep -v '^libvirt-qemu:' "/etc/$name" >"$folder/$name.$$"
done
echo "libvirt-qemu:x:$qemu_id:$qemu_id::/nonexistent:/usr/sbin/nologin" >>"$folder/passwd.$$"
echo "libvirt-qemu:x:$qemu_id:" >>"$folder/group.$$"
for name in passwd group; do
    mount --bind "$folder/$name.$$" "/etc/$name"
done

# Where /dev/kvm opens and cannot run a guest, libvirt probes QEMU again at every start of a VM (28 to 56 s each, measured).
# An empty file in its place is not enough: it must not exist.
if [ "$kvm" = hide-kvm ]; then
    dev=$folder/dev
    mkdir -p "$dev"
    mount -t tmpfs -o mode=0755,nosuid bedplate-dev "$dev"
    for node in null zero full random urandom tty; do
        cp -a "/dev/$node" "$dev/$node"
    done
    for name in pts shm net; do
        mkdir "$dev/$name"
        [ ! -d "/dev/$name" ] || mount --rbind "/dev/$name" "$dev/$name"
    done
    ln -s pts/ptmx "$dev/ptmx"
    ln -s /proc/self/fd "$dev/fd"
    mount --move "$dev" /dev
fi

exec "$@"
